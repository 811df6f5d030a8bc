"""Episodes side by side: lockstep, failures, time-outs (tests 18 and 20)."""

from __future__ import annotations

import asyncio
import functools
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.agents.chat import conversation, drawn
from workers.agents.config import EpisodeConfig
from workers.agents.environment import play
from workers.agents.executor import Episode, Episodes, Executor
from workers.agents.live import Finished
from workers.agents.model import Draw, Drawn, Model, Request
from workers.agents.outcome import EnvironmentMistake

ONCE_MORE = EpisodeConfig(retries=1)


def run(
    episode: Episode, count: int, config: EpisodeConfig = ONCE_MORE
) -> tuple[list[Finished], list[list[int]]]:
    """The finished episodes, and the rows of every round of the engine."""
    rounds: list[list[int]] = []

    def make_model(row: int, draw: Draw) -> Model:
        return conversation(draw, row=row, config=config)

    def answer(requests: Sequence[Request]) -> list[Drawn]:
        rounds.append([request.row for request in requests])
        return [drawn(f"{len(request.ids)}") for request in requests]

    tasks = [{"row": row} for row in range(count)]
    begin = functools.partial(Episodes, episode, "test", config, make_model)
    return Executor(begin, answer, lockstep=config.lockstep).run(tasks), rounds


def turns_of(row: int) -> int:
    return 1 + row % 3


@pytest.mark.parametrize("sleeps", [False, True])
def test_lockstep_does_not_depend_on_time(sleeps: bool) -> None:
    """Test 20: whatever environments take, the engine sees the same batches and the transcripts are
    the same."""
    chance = random.Random(0)

    async def episode(model: Model, task: dict[str, Any]) -> float:
        for _ in range(turns_of(task["row"])):
            if sleeps:
                await asyncio.sleep(chance.random() / 50)
            await model.reply([{"role": "user", "content": f"row {task['row']}"}])
        return 1.0

    finished, rounds = run(episode, 9)
    assert rounds == [[row for row in range(9) if turns_of(row) > turn] for turn in range(3)]
    assert [len(episode.segments.transcripts[0].turns) for episode in finished] == [1, 2, 3] * 3


def test_without_lockstep_nobody_waits_for_the_slowest() -> None:
    """The engine goes on with those that wait, and the late one joins them."""
    late = asyncio.Event()

    async def episode(model: Model, task: dict[str, Any]) -> float:
        if task["row"] == 3:
            await late.wait()
        for turn in range(3):
            await model.reply([{"role": "user", "content": "Go"}])
            if turn == 1:
                late.set()
        return 1.0

    finished, rounds = run(episode, 4, EpisodeConfig(lockstep=False))
    assert all(len(episode.segments.transcripts[0].turns) == 3 for episode in finished)
    assert 3 not in rounds[0] and 3 not in rounds[1]
    assert sum(map(len, rounds)) == 12


class Flaky:
    """Fails in one phase, in all of its lives or in the first only; counts its closings."""

    phase, lives, closed = "", 1000, 0

    def _fail(self, phase: str) -> None:
        cls = type(self)
        if phase == cls.phase and cls.lives > 0:
            cls.lives -= 1
            raise ConnectionError("the sandbox is gone")

    def reset(self, task: dict[str, Any]) -> str:
        self._fail("reset")
        return "Go"

    def step(self, action: str) -> tuple[str, bool, float]:
        self._fail("step")
        return "", True, 1.0

    def close(self) -> None:
        type(self).closed += 1
        self._fail("close")


def flaky(phase: str, lives: int) -> tuple[Episode, Callable[[], int]]:
    kind = type("Flaky", (Flaky,), {"phase": phase, "lives": lives})

    async def episode(model: Model, task: dict[str, Any]) -> Any:
        return await play(kind(), model, task)

    return episode, lambda: kind.closed


@pytest.mark.parametrize("phase", ["reset", "step", "close"])
def test_a_failure_is_no_reward(phase: str) -> None:
    """Trap 14, test 18: a broken environment is retried afresh, and its episode then has no
    outcome; it is closed each time."""
    episode, closed = flaky(phase, 1000)
    (failed,), _ = run(episode, 1)
    assert failed.outcome is None
    assert [failure.kind for failure in failed.failures] == ["ConnectionError"] * 2
    assert "the sandbox is gone" in failed.failures[0].text
    assert closed() == 2
    episode, closed = flaky(phase, 1)
    (mended,), _ = run(episode, 1)
    assert mended.outcome is not None and mended.outcome.reward == 1.0
    assert len(mended.failures) == 1 and closed() == 2
    assert len(mended.segments.transcripts[0].turns) == 1, "the second attempt began afresh"


@pytest.mark.parametrize(("late", "kind"), [(False, "ConnectionError"), (True, "timeout")])
def test_the_first_of_two_errors_is_the_reason(late: bool, kind: str) -> None:
    """What was broken can often not be closed either."""

    class Broken:
        closed = 0

        def reset(self, task: dict[str, Any]) -> str:
            return "Go"

        async def step(self, action: str) -> tuple[str, bool, float]:
            if late:
                await asyncio.sleep(60)
            raise ConnectionError("the first")

        def close(self) -> None:
            type(self).closed += 1
            raise OSError("the second")

    async def episode(model: Model, task: dict[str, Any]) -> Any:
        return await play(Broken(), model, task)

    (failed,), _ = run(episode, 1, EpisodeConfig(retries=0, step_timeout_s=0.3))
    assert [failure.kind for failure in failed.failures] == [kind] and Broken.closed == 1


def test_one_that_hangs_does_not_hold_the_others() -> None:
    """A blocking step, and one that waits for ever, are given up after step_timeout_s."""

    class Hangs:
        def reset(self, task: dict[str, Any]) -> str:
            self.row = task["row"]
            return "Go"

        def step(self, action: str) -> tuple[str, bool, float]:
            if self.row == 1:
                time.sleep(20)
            return "", True, 1.0

    async def episode(model: Model, task: dict[str, Any]) -> Any:
        try:
            if task["row"] == 2:
                await asyncio.sleep(600)
        finally:
            if task["row"] == 2:  # and its end hangs as well
                await asyncio.sleep(600)
        return await play(Hangs(), model, task)

    began = time.perf_counter()
    finished, _ = run(episode, 3, EpisodeConfig(retries=1, step_timeout_s=1.0))
    assert time.perf_counter() - began < 15
    assert finished[0].outcome is not None
    for late in finished[1:]:
        assert late.outcome is None
        assert [failure.kind for failure in late.failures] == ["timeout", "timeout"]


def test_blocking_steps_run_side_by_side() -> None:
    class Sleeps:
        def reset(self, task: dict[str, Any]) -> str:
            time.sleep(0.2)
            return "Go"

        def step(self, action: str) -> tuple[str, bool, float]:
            return "", True, 1.0

    async def episode(model: Model, task: dict[str, Any]) -> Any:
        return await play(Sleeps(), model, task)

    began = time.perf_counter()
    finished, rounds = run(episode, 24, EpisodeConfig())
    assert time.perf_counter() - began < 2.4, "24 times 0.2 seconds is 4.8"
    assert len(rounds) == 1
    assert min(sum(episode.laps) for episode in finished) >= 0.2


@pytest.mark.parametrize("returned", [None, float("nan"), "much", {"reward": 1}])
def test_an_outcome_that_is_no_number_stops_the_run(returned: object) -> None:
    async def episode(model: Model, task: dict[str, Any]) -> Any:
        await model.reply("a")
        return returned

    with pytest.raises(EnvironmentMistake, match="return a finite number"):
        run(episode, 2)


def test_an_engine_that_fails_ends_the_episodes() -> None:
    closed = []

    async def episode(model: Model, task: dict[str, Any]) -> float:
        try:
            await model.reply("a")
        finally:
            closed.append(task["row"])
        return 1.0

    def answer(requests: Sequence[Request]) -> list[Drawn]:
        raise RuntimeError("out of memory")

    executor = Executor(
        lambda: Episodes(episode, "test", ONCE_MORE, lambda row, draw: conversation(draw, row=row)),
        answer,
        lockstep=True,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        executor.run([{"row": 0}, {"row": 1}])
    assert sorted(closed) == [0, 1]


def test_agents_in_threads_do_not_wait_for_one_another() -> None:
    """More than asyncio has threads for: in lockstep those that hold one would wait for all others."""

    async def episode(model: Model, task: dict[str, Any]) -> float:
        loop = asyncio.get_running_loop()

        def agent() -> float:
            for _ in range(2):
                asyncio.run_coroutine_threadsafe(model.reply("a"), loop).result()
            return 1.0

        if task["row"] == 7:
            await asyncio.to_thread(sys.exit, 3)
        return await asyncio.to_thread(agent)

    finished, rounds = run(episode, 80, EpisodeConfig(step_timeout_s=20, retries=0))
    assert [len(rows) for rows in rounds] == [79, 79]
    assert sum(episode.outcome is not None for episode in finished) == 79
    assert "SystemExit: 3" in finished[7].failures[0].text


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_episode_leaves_behind_is_over_with_it(fails: bool) -> None:
    """Requests of tasks that nobody awaits are neither drawn into the row nor mixed up with those of
    the next attempt, which would wait for ever."""
    attempts = 0

    async def episode(model: Model, task: dict[str, Any]) -> float:
        nonlocal attempts
        attempts += 1
        await model.reply([5])

        async def asks_on() -> None:
            while True:
                await model.reply([6])

        behind.extend(asyncio.create_task(asks_on()) for _ in range(3))
        await asyncio.sleep(0)
        if fails and attempts == 1:
            raise ConnectionError("first")
        return 1.0

    behind: list[asyncio.Task[None]] = []
    finished, _ = run(episode, 1, EpisodeConfig(retries=1))
    assert finished[0].outcome is not None and attempts == 1 + fails
    (transcript,) = finished[0].segments.transcripts
    assert finished[0].segments.num_turns == 1 and transcript.turns
    assert len(transcript.ids) == 1 + transcript.turns[0].length
    assert len(finished[0].laps) == 2, "before the reply, and after it"
    assert all(task.done() for task in behind)
