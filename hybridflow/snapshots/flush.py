"""Flusher: copies a rank's file from memory to disk in a thread, while the rank goes on."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Flushed:
    """The end of a copy."""

    name: str
    """The file's."""
    num_bytes: int = 0
    blake2b: str = ""
    """As in a checkpoint's manifest."""
    error: str = ""
    """Why it failed; empty where the file is on disk."""
    damaged: bool = False
    """Whether what was read is not what was once written there: the disk is not to blame."""


def anything(target: Path) -> None:
    """Any contents are right."""


class Flusher:
    """flusher.start(source, target); flusher.result(wait=False)"""

    def __init__(self, check: Callable[[Path], None] = anything) -> None:
        """`check`: a ValueError where a copy's contents are damaged."""
        self._check = check
        self.source: Path | None = None
        """The file that is being read, which must not be written over."""
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._result: Flushed | None = None

    def start(self, source: Path, target: Path) -> None:
        """Begins to copy; returns at once. A copy that is under way is given up."""
        self.give_up()
        self._given_up.clear()
        self._result, self.source = None, source
        # Open from here on, whatever happens to its name.
        descriptor = os.open(source, os.O_RDONLY)
        self._thread = threading.Thread(
            target=self._run, args=(descriptor, target), name="flush", daemon=True
        )
        self._thread.start()

    def give_up(self) -> None:
        """Ends a copy that is under way."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self.source = self._result = None

    def result(self, *, wait: bool) -> Flushed | None:
        """The end of the last copy; None while it is under way. A RuntimeError without one."""
        if self._thread is None:
            raise RuntimeError("flush result asked for, but nothing was flushed")
        if wait:
            self._thread.join()
        if not self._thread.is_alive():
            self.source = None
        return self._result

    def _run(self, descriptor: int, target: Path) -> None:
        try:
            with os.fdopen(descriptor, "rb", buffering=0) as source:
                self._result = self._copy(source.fileno(), target)
        except OSError as error:
            self._result = Flushed(name=target.name, error=str(error))
        except ValueError as error:
            self._result = Flushed(name=target.name, error=str(error), damaged=True)

    def _copy(self, source: int, target: Path) -> Flushed:
        """read, BLAKE2b, write and fsync all release the interpreter's lock."""
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher, size = hashlib.blake2b(), 0
        with target.open("wb") as file:
            while chunk := os.read(source, CHUNK_BYTES):
                if self._given_up.is_set():
                    return Flushed(name=target.name, error="given up")
                hasher.update(chunk)
                file.write(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        self._check(target)
        return Flushed(name=target.name, num_bytes=size, blake2b=hasher.hexdigest()[:32])
