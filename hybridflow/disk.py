"""Disk: the file operations that make a checkpoint safe, in one place, so that a simulation can put
a disk that forgets in theirs (tests/recovery/simulation)."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from hybridflow.whole_file import whole_file

LOGGER = logging.getLogger(__name__)
ROOM = ".room"
"""A file that only shows that there is room for it."""


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
    file.rewrite(["another first line"])
    file.write()            # an OSError where lines still wait
    """

    def __init__(self, path: Path, *, synced: bool = False) -> None:
        """`synced`: every line is on disk before append returns."""
        self.path, self._synced = path, synced
        self._waiting = b""
        self._is_rewritten = False
        """Whether what waits takes the place of the whole file."""
        self._is_begun = False
        """Whether the end of the file is this process' own."""

    def append(self, line: str) -> None:
        """Adds a line; where the disk refuses it, that is said once, in the log."""
        already = self.is_waiting
        self._waiting += line.encode() + b"\n"
        self.try_writing(quiet=already)

    def rewrite(self, lines: Iterable[str]) -> None:
        """Puts a file of these lines, synced, in the place of the present one, which stays as it is
        until the disk has room for them."""
        self._waiting = "".join([line + "\n" for line in lines]).encode()
        self._is_rewritten = True
        self.try_writing()

    def text(self) -> str:
        """The file's text, with the lines that wait."""
        written = ""
        if not self._is_rewritten and self.path.exists():
            written = self.path.read_text(errors="replace")
        return written + self._waiting.decode()

    def try_writing(self, *, quiet: bool = False) -> None:
        """As `write`; what the disk refuses is said in the log unless `quiet`."""
        try:
            self.write()
        except OSError as error:
            if not quiet:
                LOGGER.warning("%s: %s; its lines wait for room in memory", self.path, error)

    def write(self) -> None:
        """Writes the lines that wait. A line that was written in part is gone on with."""
        if not self.is_waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_rewritten:
            with whole_file(self.path) as temporary:
                DISK.write_synced(temporary, self._waiting.decode())
            DISK.sync(self.path.parent)
            self._waiting, self._is_rewritten, self._is_begun = b"", False, True
            return
        with self.path.open("a+b", buffering=0) as file:
            if not self._is_begun and _is_torn(file):
                self._waiting = b"\n" + self._waiting
            self._is_begun = True
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
            if self._synced:
                os.fsync(file.fileno())

    @property
    def is_waiting(self) -> bool:
        """Whether lines wait for room."""
        return bool(self._waiting) or self._is_rewritten


def remove_torn_end(path: Path) -> None:
    """Removes a last line that was cut off, by the death of whoever wrote it."""
    with path.open("r+b") as file:
        if not _is_torn(file):
            return
        length = path.read_bytes().rfind(b"\n") + 1
        file.truncate(length)


def wait_for_room(directory: Path, num_bytes: int, within_s: float) -> None:
    """Returns once the disk takes a file of so many bytes in `directory`; the last OSError where it
    did not within that time."""
    deadline, refused = time.monotonic() + within_s, False
    while True:
        try:
            with whole_file(directory / ROOM) as temporary:
                DISK.write_synced(temporary, " " * num_bytes)
            (directory / ROOM).unlink(missing_ok=True)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            if not refused:
                LOGGER.warning("%s: %s; waiting for the disk", directory, error)
            refused = True
            time.sleep(1.0)


def _is_torn(file: IO[bytes]) -> bool:
    """Whether the last line was cut off, by the death of whoever wrote it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    return file.read(1) not in (b"", b"\n")


DISK = Disk()
