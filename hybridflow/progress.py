"""Which long work is under way: whoever does it names it, and whoever waits for it can see it.

    with activity("loading the weights of Qwen2.5-0.5B"):
        ...

Activities nest. The controller shows its own (progress_display.py). A host process writes its
innermost one into a file (`write_to`), which the controller reads only while it waits (pool.py).
Naming an activity costs 30 microseconds, so that no call gets slower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 10.0
"""Seconds after which the log says for the first time what a process is doing."""
FILE_BYTES = 512


def nothing() -> str:
    return ""


@dataclass(slots=True, eq=False)
class Activity:
    """Some work that has begun and not ended; made by `activity`."""

    what: str
    total: int | None = None
    """Units of work in all, where they are known."""
    detail: Callable[[], str] = nothing
    """Says what other processes do for it meanwhile; called by another thread."""
    patience_s: float = PATIENCE_S
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of the activities inside it that have ended."""
    num_reports: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def advance(self, amount: int = 1) -> None:
        """Counts finished units of the total."""
        self.done += amount

    @property
    def state(self) -> str:
        """12 s, or 3 of 40, 12 s."""
        if self.total is None:
            return duration(self.seconds)
        return f"{self.done} of {self.total}, {duration(self.seconds)}"

    def overdue(self) -> bool:
        """Whether the log should say (again) that it goes on: after 1, 3, 6, 12, ... times its
        patience."""
        factor = 1 if self.num_reports == 0 else 3 * 2 ** (self.num_reports - 1)
        return self.seconds >= factor * self.patience_s


_STACK: list[Activity] = []
"""This process' activities, the outermost first."""
_FILE: int | None = None
"""Descriptor of the file that a host process writes its innermost activity into."""
_LISTENERS: list[Callable[[Activity], None]] = []


@contextmanager
def activity(
    what: str,
    *,
    total: int | None = None,
    detail: Callable[[], str] = nothing,
    patience_s: float = PATIENCE_S,
) -> Iterator[Activity]:
    """Names the work inside the `with` block. Only the patience of the outermost activity
    matters."""
    current = Activity(what=what, total=total, detail=detail, patience_s=patience_s)
    _STACK.append(current)
    _write()
    try:
        yield current
    finally:
        _STACK.remove(current)
        _write()
        if _STACK:
            parts = _STACK[-1].parts
            parts[what] = parts.get(what, 0.0) + current.seconds
        else:
            for listener in _LISTENERS:
                listener(current)


def counted(items: Sequence[T], what: str, *, detail: Callable[[], str] = nothing) -> Iterator[T]:
    """The items one after the other; the activity counts those that are done with."""
    with activity(what, total=len(items), detail=detail) as current:
        for item in items:
            yield item
            current.advance()


def activities() -> list[Activity]:
    """The activities of this process, the outermost first; any thread may ask."""
    return list(_STACK)


@contextmanager
def told_of_ends(listener: Callable[[Activity], None]) -> Iterator[None]:
    """`listener` is called when an outermost activity ends."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def write_to(path: Path) -> None:
    """From now on the innermost activity of this process stands in `path`, for `read`."""
    global _FILE
    _FILE = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    _write()


def read(path: Path) -> str:
    """The activity of the process that writes to `path`, and for how long; "" for none, or a
    process that is gone."""
    try:
        line = path.read_text(errors="ignore").rstrip()
    except FileNotFoundError:
        return ""
    started, _, what = line.partition(" ")
    if not what:
        return ""
    # The clocks of two nodes may differ by more than the activity has lasted.
    return f"{what} ({duration(max(0.0, time.time() - float(started)))})"


def _write() -> None:
    if _FILE is None:
        return
    line = f"{time.time() - _STACK[-1].seconds:.1f} {_STACK[-1].what}" if _STACK else ""
    os.pwrite(_FILE, line.encode()[:FILE_BYTES].ljust(FILE_BYTES), 0)


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 2:05 min, 1:12 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
