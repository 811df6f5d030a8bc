"""Snapshots: the state of a trained role after a step, as files that any layout reads.

    files.py    a rank's file: boxes of tensors with their digests; written without a collective
    reading.py  any rank's boxes out of everybody's files
    memory.py   the copies in the nodes' memory (/dev/shm), and the records that make them commits
    flush.py    from memory to disk in the background

Checkpoints on disk (checkpoint.py) hold the same files. Deciding when to take a snapshot is left
out (controllers/saving.py).
"""
