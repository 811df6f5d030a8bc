"""Clock: the time that an episode takes between two replies."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.agents.outcome import EnvironmentMistake

MOST_CANCELS = 4
"""The reply that is late, and what closes the environment after it, may each take the limit; code that
goes on after so many has a loop that no time-out ends."""
ASYNCIO = str(Path(asyncio.__file__).parent)


class Clock:
    """Limits the time between replies: past the limit it cancels the episode; an episode that goes on
    for all that is a mistake, which `stop_run` is given."""

    def __init__(self, limit_s: float, stop_run: Callable[[EnvironmentMistake], None]) -> None:
        self.limit_s, self.late = limit_s, False
        self.laps: list[float] = []
        """Seconds before each reply, and after the last one."""
        self._stop_run, self._num_cancels = stop_run, 0
        self._started, self._before = 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, task: asyncio.Task[Any], *, again: bool = False) -> None:
        """`again`: the last request got no reply, and its time belongs to the next one's."""
        self._started = time.perf_counter()
        self._before = self.laps.pop() if again and self.laps else 0.0

        def cancel() -> None:
            self.late = True
            if self._num_cancels == MOST_CANCELS:
                self._stop_run(_goes_on(task, self.limit_s))
                return
            self._num_cancels += 1
            task.cancel()
            # Whatever closes the environment may hang too, and gets as long again.
            self._timer = asyncio.get_running_loop().call_later(self.limit_s, cancel)

        self._timer = asyncio.get_running_loop().call_later(self.limit_s, cancel)

    def stop(self) -> None:
        if self._timer is not None:
            self.laps.append(self._before + time.perf_counter() - self._started)
            self._timer.cancel()
            self._timer = None


def _goes_on(task: asyncio.Task[Any], limit_s: float) -> EnvironmentMistake:
    coroutine: Any = task.get_coro()
    place = ""
    while inspect.iscoroutine(coroutine):
        frame = coroutine.cr_frame
        if frame is not None and not frame.f_code.co_filename.startswith(ASYNCIO):
            place = f" at {frame.f_code.co_filename}, line {frame.f_lineno}"
        coroutine = coroutine.cr_await
    return EnvironmentMistake(
        f"an episode took over episode.step_timeout_s={limit_s}, was cancelled {MOST_CANCELS} times, and "
        f"goes on{place}; let asyncio.CancelledError pass there"
    )
