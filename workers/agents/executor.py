"""Executor: runs the episodes of a call side by side, and answers their requests.

The episodes live in an asyncio loop in a thread of its own; the generation engine is called from
the thread that called run(). In lockstep the engine is asked when every live episode waits for it,
in the order of the rows: what it computes does not depend on how long environments take. Without,
it is asked when it is free and half of the live ones wait.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.agents.config import EpisodeConfig
from workers.agents.model import Drawn, Model, Request
from workers.agents.outcome import (
    EnvironmentMistake,
    Failure,
    LimitReached,
    Outcome,
    checked_outcome,
)

LOGGER = logging.getLogger(__name__)

Task = dict[str, Any]
"""The row of data that an episode is about: its columns, and `prompt` where it has one."""
Episode = Callable[[Model, Task], Coroutine[Any, Any, Any]]
"""async def episode(model, task) -> float | Outcome"""


@dataclass(kw_only=True)
class Finished:
    """An episode that came to its end, or that failed every time."""

    model: Model
    outcome: Outcome | None
    """None where it failed."""
    failures: list[Failure] = field(default_factory=list)
    """Why each failed attempt failed."""
    laps: list[float] = field(default_factory=list)
    """Seconds of the last attempt outside of replies: before each reply, and after the last one."""


class Clock:
    """Limits the time between replies: past the limit it cancels the episode."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.late = limit_s, False
        self.laps: list[float] = []
        """Seconds before each reply, and after the last one."""
        self._started = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, task: asyncio.Task[Any]) -> None:
        self._started = time.perf_counter()

        def cancel() -> None:
            self.late = True
            task.cancel()
            # Whatever closes the environment may hang too, and gets as long again.
            self._timer = asyncio.get_running_loop().call_later(self.limit_s, cancel)

        self._timer = asyncio.get_running_loop().call_later(self.limit_s, cancel)

    def stop(self) -> None:
        if self._timer is not None:
            self.laps.append(time.perf_counter() - self._started)
            self._timer.cancel()
            self._timer = None


class Executor:
    """finished = Executor(episode, name, config, make_model, answer).run(tasks)

    make_model(row, draw) -> Model of a new attempt; answer(requests) -> what the engine drew for
    each.
    """

    def __init__(
        self,
        episode: Episode,
        name: str,
        config: EpisodeConfig,
        make_model: Callable[[int, Callable[[Request], Any]], Model],
        answer: Callable[[Sequence[Request]], Sequence[Drawn]],
    ) -> None:
        self.episode, self.name, self.config = episode, name, config
        self.make_model, self.answer = make_model, answer
        self._rounds: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[Request, asyncio.Future[Drawn]]] = {}
        self._num_live = 0
        self._busy = False
        """Whether the engine has requests without an answer."""

    def run(self, tasks: Sequence[Task]) -> list[Finished]:
        """One finished episode for every task, in order; a mistake of the environment's code, or
        of the engine, is raised here."""
        if not tasks:
            return []
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="episodes", daemon=True)
        thread.start()
        all_of_them = asyncio.run_coroutine_threadsafe(self._all(tasks), loop)
        try:
            while (requests := self._rounds.get()) is not None:
                answers = self.answer(requests)
                loop.call_soon_threadsafe(self._deliver, requests, answers)
            return all_of_them.result()
        finally:
            all_of_them.cancel()
            asyncio.run_coroutine_threadsafe(_settle(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _all(self, tasks: Sequence[Task]) -> list[Finished]:
        self._num_live = len(tasks)
        running = []
        for row, task in enumerate(tasks):
            running.append(asyncio.create_task(self._with_retries(row, task)))
        try:
            return list(await asyncio.gather(*running))
        finally:
            for attempt in running:
                attempt.cancel()
            self._rounds.put(None)

    async def _with_retries(self, row: int, task: Task) -> Finished:
        failures: list[Failure] = []
        try:
            for _ in range(1 + self.config.retries):
                clock = Clock(self.config.step_timeout_s)
                finished = await self._attempt(row, task, clock, failures)
                if finished.outcome is not None:
                    break
            return finished
        finally:
            self._num_live -= 1
            self._ask()

    async def _attempt(
        self, row: int, task: Task, clock: Clock, failures: list[Failure]
    ) -> Finished:
        """One run of the episode in a task of its own, which can be cancelled alone."""

        async def draw(request: Request) -> Drawn:
            clock.stop()
            future = asyncio.get_running_loop().create_future()
            self._waiting[row] = (request, future)
            self._ask()
            answer: Drawn = await future
            clock.start(attempt)
            return answer

        model = self.make_model(row, draw)
        attempt = asyncio.create_task(self._outcome(model, task))
        clock.start(attempt)
        outcome = None
        try:
            outcome = await attempt
        except asyncio.CancelledError:
            if not clock.late:
                attempt.cancel()
                raise
            failures.append(
                Failure(
                    "timeout",
                    f"it took over episode.step_timeout_s={self.config.step_timeout_s} after "
                    f"{model.segments.num_turns} replies",
                )
            )
        except EnvironmentMistake:
            raise
        except Exception as error:
            # The environment's code and whatever it depends on: never a reward.
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = (
                f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno}) after "
                f"{model.segments.num_turns} replies"
            )
            failures.append(Failure(type(error).__name__, text))
            LOGGER.warning("environment=%s, row %d: %s", self.name, row, text)
        finally:
            clock.stop()
            self._waiting.pop(row, None)
        return Finished(model=model, outcome=outcome, failures=failures, laps=clock.laps)

    async def _outcome(self, model: Model, task: Task) -> Outcome:
        try:
            returned = await self.episode(model, task)
        except LimitReached:
            returned = 0.0
        return checked_outcome(returned, model.segments.num_turns, self.name)

    def _ask(self) -> None:
        """Hands the waiting requests to the engine once it is free and enough episodes wait."""
        least = self._num_live
        if not self.config.lockstep:
            least = (self._num_live + 1) // 2
        if self._waiting and not self._busy and len(self._waiting) >= least:
            self._busy = True
            self._rounds.put([self._waiting[row][0] for row in sorted(self._waiting)])

    def _deliver(self, requests: Sequence[Request], answers: Sequence[Drawn]) -> None:
        self._busy = False
        for request, answer in zip(requests, answers, strict=True):
            _, future = self._waiting.pop(request.row, (request, None))
            if future is not None and not future.done():
                future.set_result(answer)
        self._ask()


async def _settle() -> None:
    """Waits until the cancelled episodes have closed what they had open."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if others:
        await asyncio.wait(others, timeout=10.0)
