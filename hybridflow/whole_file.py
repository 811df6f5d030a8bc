"""whole_file(): a file that is there as a whole or not at all, for readers of this machine.

A file that must survive the loss of power is written by Disk (disk.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".writing"
"""In the name of a file that is not whole yet, behind the writer's process id."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, of the same suffix, which becomes `path` once everything was written.
    Several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{MARK}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_drafts(directory: Path) -> None:
    """Removes what writers of this machine that were killed have left in a directory; for a process that
    writes nothing at the moment."""
    for draft in directory.glob(f".*{MARK}*"):
        writer = draft.name.partition(MARK)[0].rpartition(".")[2]
        if writer == str(os.getpid()) or not Path("/proc", writer).exists():
            draft.unlink(missing_ok=True)
