"""Heartbeat: whether an asyncio loop in another thread goes on.

An episode that blocks it (time.sleep in an async method, a loop without an await) stops all others
with it, and no time-out can fire: that is found from outside. Time in which the loop could not have
gone on, because the machine is busy or the process stopped, does not count.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from pathlib import Path

from workers.agents.outcome import EnvironmentMistake


class Heartbeat:
    """heartbeat = Heartbeat(loop, thread, name, limit_s=60.0)
    heartbeat.check()            # every interval_s; an error once the loop stands still for limit_s
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        thread: threading.Thread,
        name: str,
        limit_s: float,
    ) -> None:
        self._loop, self._thread, self._name, self._limit_s = loop, thread, name, limit_s
        self.interval_s = min(1.0, limit_s / 4)
        self.is_late = False
        """Whether the loop was found to stand still."""
        self._answered, self._checked_at, self._queued_s = True, 0.0, 0.0
        self._task: asyncio.Task[object] | None = None
        """The one that the loop was at in the last check."""
        self._stood_s = 0.0
        """For how long it has been at that without an answer."""

    def check(self) -> None:
        """Asks the loop for a sign of life; an EnvironmentMistake that names the line where it has
        stood still for limit_s."""
        now, queued_s = time.monotonic(), self._waited_for_a_core_s()
        # A check that comes late says that this thread had no time either.
        counted_s = min(now - self._checked_at, self.interval_s) - (queued_s - self._queued_s)
        self._checked_at, self._queued_s = now, queued_s
        task, before = asyncio.current_task(self._loop), self._task
        self._task = task
        if self._answered:
            self._answered, self._stood_s = False, 0.0
            self._loop.call_soon_threadsafe(self._answer)
            return
        self._stood_s += max(0.0, counted_s)
        if task is not before:  # one episode after the other, each of which takes its time
            self._stood_s = 0.0
        if self._stood_s > self._limit_s and not self._answered:
            self.is_late = True
            raise EnvironmentMistake(
                f"environment={self._name}: the loop that all episodes share has stood still for "
                f"{self._stood_s:.0f} s at {self._place()}; await there, or do what blocks in a "
                "plain method, which runs in a thread"
            )

    def _answer(self) -> None:
        self._answered = True

    def _waited_for_a_core_s(self) -> float:
        """Seconds that the loop's thread was ready to run and had no core (Linux; elsewhere 0)."""
        try:
            numbers = Path(f"/proc/self/task/{self._thread.native_id}/schedstat").read_text()
        except OSError:
            return 0.0
        return int(numbers.split()[1]) / 1e9

    def _place(self) -> str:
        """The line that the loop's thread is at."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "the end of its thread"
        here = traceback.extract_stack(frame)[-1]
        return f"{here.filename}, line {here.lineno}"
