"""Episodes: run side by side in an asyncio loop in a thread of its own, and ask for replies.

The generation engine is called from the thread that owns the object: Executor answers all requests
of a call; episode_stream.py answers them between two slices of generation. In lockstep the engine
is asked when every live episode waits for it, in the order of the rows: what it computes does not
depend on how long environments take.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from workers.agents.clock import Clock
from workers.agents.config import EpisodeConfig
from workers.agents.heartbeat import Heartbeat
from workers.agents.live import Finished, LiveEpisodes, PendingRequest, Task
from workers.agents.loop_thread import LoopThread
from workers.agents.model import Drawn, Model, Request
from workers.agents.outcome import (
    EnvironmentMistake,
    Failure,
    LimitReached,
    Outcome,
    checked_outcome,
    text_of,
)
from workers.agents.threads import as_failure, end_forked

LOGGER = logging.getLogger(__name__)

LEAST_STANDSTILL_S = 10.0
"""Shorter ones may be a busy machine's, whatever episode.step_timeout_s is."""
JOIN_SHARE, QUIET_SHARE = 0.5, 0.1
"""Without lockstep the engine waits for those that are about to ask, since two half batches take
longer than a whole one: at most that share of the last round's time, and no longer than nobody has
joined for the second share of it."""
TOLD = 3
"""Failures at one place that are logged one by one."""
MOST_SAID = 500
"""Characters of an error's own text in the log."""
FIRST_ROUND_S = 1.0
"""Stands for the last round's time before the first one."""
Episode = Callable[[Model, Task], Coroutine[Any, Any, Any]]
"""async def episode(model, task) -> float | Outcome"""


class Episodes(LiveEpisodes):
    """episodes = Episodes(episode, name, config, make_model)

    Those of this process. make_model(row, draw) -> Model of a new attempt.
    """

    def __init__(
        self,
        episode: Episode,
        name: str,
        config: EpisodeConfig,
        make_model: Callable[[int, Callable[[Request], Any]], Model],
    ) -> None:
        self.episode, self.name, self.config = episode, name, config
        self.make_model = make_model
        self._thread = LoopThread()
        self._loop = self._thread.loop
        limit_s = max(config.step_timeout_s, LEAST_STANDSTILL_S)
        self._heartbeat = Heartbeat(self._loop, self._thread.thread, name, limit_s)
        super().__init__(look=self._heartbeat.check, look_s=self._heartbeat.interval_s)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answers: dict[int, asyncio.Future[Drawn]] = {}
        """Answers that episodes wait for, by the number of the request."""
        self._numbers = itertools.count()
        self._told: Counter[str] = Counter()

    def start(
        self, tasks: Mapping[int, Task], failures: Mapping[int, Sequence[Failure]] | None = None
    ) -> None:
        """See LiveEpisodes.start; `failures`: those of attempts that were made elsewhere."""
        before = failures or {}
        with self._changed:
            self._live |= tasks.keys()

        def begin() -> None:
            for row, task in tasks.items():
                attempts = self._with_retries(row, task, list(before.get(row, ())))
                self._running[row] = self._loop.create_task(attempts)

        self._loop.call_soon_threadsafe(begin)

    def answer(self, answers: Sequence[tuple[PendingRequest, Drawn]]) -> None:
        """See LiveEpisodes.answer."""

        def deliver() -> None:
            for pending, reply in answers:
                answer = self._answers.get(pending.number)
                if answer is not None and not answer.done():
                    answer.set_result(reply)

        self._loop.call_soon_threadsafe(deliver)

    def close(self) -> None:
        """See LiveEpisodes.close. A loop that is blocked is left alone, in a thread that keeps no
        process from ending."""
        if self._heartbeat.is_late:
            return
        self._thread.close(self._running)

    async def _with_retries(self, row: int, task: Task, failures: list[Failure]) -> None:
        try:
            for _ in range(max(1, 1 + self.config.retries - len(failures))):
                clock = Clock(self.config.step_timeout_s, self._stop_run)
                finished = await self._attempt(row, task, clock, failures)
                if finished.outcome is not None:
                    break
        except Exception as error:
            self._stop_run(error)
            return
        del self._running[row]
        self._end(row, finished)

    def _stop_run(self, raised: Exception) -> None:
        """For the thread that waits, which raises it."""
        error = raised
        if isinstance(raised, EnvironmentMistake) and f"environment={self.name}" not in str(raised):
            error = EnvironmentMistake(f"environment={self.name}: {raised}")
            error.__cause__ = raised
        self._fail(error)

    async def _attempt(
        self, row: int, task: Task, clock: Clock, failures: list[Failure]
    ) -> Finished:
        """One run of the episode in a task of its own, which can be cancelled alone."""

        async def draw(request: Request) -> Drawn:
            if asyncio.get_running_loop() is not self._loop:
                raise EnvironmentMistake(
                    f"environment={self.name} calls model.reply in a loop of its own (asyncio.run in a "
                    "thread); await it in the episode, or give the thread the URL of an Endpoint"
                )
            if attempt.done():  # a task that the episode left behind
                raise asyncio.CancelledError
            clock.stop()
            pending, answer = (
                PendingRequest(request, next(self._numbers)),
                self._loop.create_future(),
            )
            self._answers[pending.number] = answer
            waiting.add(answer)
            self._take(pending)
            answered = False
            try:
                reply: Drawn = await answer
                answered = True
                return reply
            finally:
                waiting.discard(answer)
                del self._answers[pending.number]
                self._forget(pending)
                clock.start(attempt, again=not answered)

        waiting: set[asyncio.Future[Drawn]] = set()
        model = self.make_model(row, draw)
        attempt = asyncio.create_task(self._outcome(model, task))
        clock.start(attempt)
        outcome = None
        try:
            outcome = await attempt
        except asyncio.CancelledError:
            if _is_cancelled():
                attempt.cancel()
                raise
            kind, text = "cancelled", "its code cancelled it"
            if clock.late:
                kind = "timeout"
                text = f"it took over episode.step_timeout_s={self.config.step_timeout_s}"
            failures.append(Failure(kind, f"{text} after {model.segments.num_turns} replies"))
        except EnvironmentMistake:
            raise
        except Exception as error:
            # The environment's code and whatever it depends on: never a reward.
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(text_of(error).split())[:MOST_SAID]
            text = (
                f"{type(error).__name__}: {said} ({where.filename}, line {where.lineno}) after "
                f"{model.segments.num_turns} replies"
            )
            failures.append(Failure(type(error).__name__, text))
            self._tell(row, text, f"{type(error).__name__} {where.filename} {where.lineno}")
        finally:
            # The episode has ended: nobody reads what its tasks still ask for.
            for answer in list(waiting):
                answer.cancel()
            await asyncio.sleep(0)
            clock.stop()
        return Finished(
            segments=model.segments, outcome=outcome, failures=failures, laps=clock.laps
        )

    def _tell(self, row: int, text: str, place: str) -> None:
        """Logs a failure, the first few of those at one place; the metrics count all."""
        self._told[place] += 1
        if self._told[place] <= TOLD:
            LOGGER.warning("environment=%s, row %d: %s", self.name, row, text)
        if self._told[place] == TOLD:
            LOGGER.warning("environment=%s: further failures there are not named", self.name)

    async def _outcome(self, model: Model, task: Task) -> Outcome:
        process = os.getpid()
        try:
            # An attempt may change its task, of which others of the group have the same object.
            returned = await self.episode(model, copy.deepcopy(task))
        except LimitReached:
            returned = 0.0
        except (asyncio.CancelledError, Exception):
            raise
        except BaseException as error:  # such as sys.exit's, which would end the loop of all
            end_forked(process, error)
            raise as_failure(error) from error
        return checked_outcome(returned, model.segments.num_turns, self.name)


class Executor:
    """finished = Executor(make_episodes, answer, lockstep=True).run(tasks)

    answer(requests) -> what the engine drew for each. In lockstep it is asked when every live
    episode waits; without, when half of them do, and the others have had a while to join them.
    """

    def __init__(
        self,
        make_episodes: Callable[[], LiveEpisodes],
        answer: Callable[[Sequence[Request]], Sequence[Drawn]],
        *,
        lockstep: bool,
    ) -> None:
        self.make_episodes, self.answer = make_episodes, answer
        self._share = 1.0 if lockstep else 0.5

    def run(self, tasks: Sequence[Task]) -> list[Finished]:
        """One finished episode for every task, in order; a mistake of the environment's code, or
        of the engine, is raised here."""
        if not tasks:
            return []
        episodes = self.make_episodes()
        try:
            episodes.start(dict(enumerate(tasks)))
            round_s = FIRST_ROUND_S
            while episodes.num_live:
                episodes.wait(self._share)
                if self._share < 1:
                    _let_join(episodes, round_s)
                if pending := episodes.requests():
                    began = time.perf_counter()
                    answers = self.answer([waiting.request for waiting in pending])
                    round_s = time.perf_counter() - began
                    episodes.answer(list(zip(pending, answers, strict=True)))
            return list(episodes.finished().values())
        finally:
            episodes.close()


def _let_join(episodes: LiveEpisodes, round_s: float) -> None:
    """Waits for further requests, see JOIN_SHARE."""
    until, before = time.monotonic() + JOIN_SHARE * round_s, -1
    while before < episodes.num_pending and time.monotonic() < until:
        before = episodes.num_pending
        if episodes.wait(1.0, QUIET_SHARE * round_s):
            return


def _is_cancelled() -> bool:
    """Whether the present task itself is being cancelled, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
