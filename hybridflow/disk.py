"""Disk: the file operations that make a checkpoint safe, in one place, so that a simulation can put
a disk that forgets in theirs (tests/recovery/simulation)."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

LOGGER = logging.getLogger(__name__)


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


class LineFile:
    """A file that lines are appended to, also while the disk is full: lines wait in memory until it
    has room.

    file = LineFile(path)
    file.append("line")
    file.write()            # an OSError where lines still wait
    """

    def __init__(self, path: Path, *, synced: bool = False) -> None:
        """`synced`: every line is on disk before append returns."""
        self.path, self._synced = path, synced
        self._waiting = b""
        self._is_begun = False
        """Whether the end of the file is this process' own."""

    def append(self, line: str) -> None:
        """Adds a line; where the disk refuses it, that is said once, in the log."""
        already = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        try:
            self.write()
        except OSError as error:
            if not already:
                LOGGER.warning("%s: %s; its lines wait for room in memory", self.path, error)

    def write(self) -> None:
        """Writes the lines that wait. A line that was written in part is gone on with."""
        if not self._waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if not self._is_begun and _is_torn(file):
                self._waiting = b"\n" + self._waiting
            self._is_begun = True
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
            if self._synced:
                os.fsync(file.fileno())


def _is_torn(file: IO[bytes]) -> bool:
    """Whether the last line was cut off, by the death of whoever wrote it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    return file.read(1) not in (b"", b"\n")


DISK = Disk()
