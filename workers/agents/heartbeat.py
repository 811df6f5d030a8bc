"""Heartbeat: whether an asyncio loop in another thread goes on.

An episode that blocks it (time.sleep in an async method, a loop without an await) stops all others
with it, and no time-out can fire: that is found from outside.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback

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
        self._answered, self._asked_at = True, 0.0

    def check(self) -> None:
        """Asks the loop for a sign of life; an EnvironmentMistake that names the line where it has
        stood still for limit_s."""
        now = time.monotonic()
        if self._answered:
            self._answered, self._asked_at = False, now
            self._loop.call_soon_threadsafe(self._answer)
        elif now - self._asked_at > self._limit_s and not self._answered:
            self.is_late = True
            raise EnvironmentMistake(
                f"environment={self._name}: the loop that all episodes share has stood still for "
                f"{now - self._asked_at:.0f} s at {self._place()}; await there, or do what blocks "
                "in a plain method, which runs in a thread"
            )

    def _answer(self) -> None:
        self._answered = True

    def _place(self) -> str:
        """The line that the loop's thread is at."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "the end of its thread"
        here = traceback.extract_stack(frame)[-1]
        return f"{here.filename}, line {here.lineno}"
