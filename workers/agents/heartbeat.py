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

RUNNABLE = "R"
"""Linux' state of a thread that runs or waits for a processor."""


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
        self._answered, self._checked_at, self._cpu_s = True, 0.0, 0.0
        self._stood_s = 0.0
        """For how long it could have answered."""

    def check(self) -> None:
        """Asks the loop for a sign of life; an EnvironmentMistake that names the line where it has
        stood still for limit_s."""
        counted_s = self._counted_s()
        if self._answered:
            self._answered, self._stood_s = False, 0.0
            self._loop.call_soon_threadsafe(self._answer)
            return
        self._stood_s += counted_s
        if self._stood_s > self._limit_s and not self._answered:
            self.is_late = True
            raise EnvironmentMistake(
                f"environment={self._name}: the loop that all episodes share has stood still for "
                f"{self._stood_s:.0f} s at {self._place()}; await there, or do what blocks in a "
                "plain method, which runs in a thread"
            )

    def _answer(self) -> None:
        self._answered = True

    def _counted_s(self) -> float:
        """Seconds since the last check in which the loop could have gone on: those of a processor
        that it got where it is at work or waits for one, else all of them (Linux; elsewhere always
        all)."""
        now, of_thread = time.monotonic(), Path(f"/proc/self/task/{self._thread.native_id}")
        # A check that comes late says that this thread had no time either.
        passed_s = min(now - self._checked_at, self.interval_s)
        self._checked_at = now
        try:
            state = (of_thread / "stat").read_text().rpartition(")")[2].split()[0]
            cpu_s = int((of_thread / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            return passed_s
        worked_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        return min(passed_s, worked_s) if state == RUNNABLE else passed_s

    def _place(self) -> str:
        """The line that the loop's thread is at."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "the end of its thread"
        here = traceback.extract_stack(frame)[-1]
        return f"{here.filename}, line {here.lineno}"
