"""Disk: the file operations that make a checkpoint safe, in one place, so that a simulation can put
a disk that forgets in theirs (tests/recovery/simulation)."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Disk:
    """What CheckpointStore does to files besides the methods of a path."""

    def write_synced(self, path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def sync(self, directory: Path) -> None:
        """Flushes a directory's entries (names) to disk."""
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, directory: Path) -> None:
        """Removes a directory and everything in it."""
        shutil.rmtree(directory)

    def digests(
        self, directory: Path, names: list[str], *, sync: bool
    ) -> dict[str, dict[str, Any]]:
        """Size and BLAKE2b digest of the files by relative name; the files are flushed to disk if
        `sync`."""

        def digest_file(name: str) -> dict[str, Any]:
            with (directory / name).open("rb") as file:
                if sync:
                    os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
                return {"bytes": file.tell(), "blake2b": digest}

        # hashlib releases the interpreter lock, so threads hash at the speed of the disk.
        with ThreadPoolExecutor(max_workers=8) as threads:
            return dict(zip(names, threads.map(digest_file, names), strict=True))


DISK = Disk()
