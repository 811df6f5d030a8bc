"""Episodes that are drawn ahead of their steps, in one process: the synchronous run, bit for bit,
with staleness 0; bounds, resuming, validation and failures with more."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.agents.chat import chat_settings, tasks
from tests.asynchrony.runs import TRUNCATE, StreamingSession, drive, equal_weights
from workers.agents.model import Model
from workers.generation.hf import HfEngine


class Talk:
    """Answers one to three times, however long that takes; remembers the episodes that ended."""

    ended: ClassVar[list[str]] = []
    slow: ClassVar[float] = 0.0
    broken: ClassVar[set[str]] = set()

    def reset(self, task: dict[str, Any]) -> None:
        self.task, self.left = task["answer"], 1 + int(task["answer"]) % 3

    async def step(self, action: str) -> tuple[str, bool, float]:
        if self.slow:
            await asyncio.sleep(random.random() * self.slow)
        if self.task in self.broken:
            raise ConnectionError("no sandbox")
        self.left -= 1
        if not self.left:
            type(self).ended.append(self.task)
        return f"{self.left} left", not self.left, float(len(action) % 3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Talk.ended, Talk.slow, Talk.broken = [], 0.0, set()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Two tasks a step, two episodes each, of replies of at most 6 tokens."""
    return chat_settings(tmp_path) | {
        "data.train": tasks(tmp_path / "tasks.jsonl", 12),
        "data.batch_size": 2,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.sampling.max_response_tokens": 6,
        "asynchrony.slice_steps": 2,
        "loop.num_steps": 4,
        "metrics.console": False,
    }


@pytest.mark.parametrize("recipe", ["grpo", "remax"])
def test_staleness_0_is_the_synchronous_run(
    tiny: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """F12, 1 and 20, for episodes: turns, losses and weights, bit for bit, although environments
    take their time."""
    calm = drive(tiny, tmp_path / "calm", recipe=recipe, num_steps=2, environment=Talk)
    Talk.slow = 0.02
    streamed = drive(
        tiny,
        tmp_path / "streamed",
        recipe=recipe,
        session_class=StreamingSession,
        num_steps=2,
        environment=Talk,
    )
    assert streamed.numbers() == calm.numbers()
    assert calm.metrics[0]["episode/turns"] > 1
    assert equal_weights(streamed, calm)


def test_drain_mode_resumes_bit_for_bit(tiny: dict[str, Any], tmp_path: Path) -> None:
    """F12, 8, for episodes, with a validation after every step."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
    settings["data.validation"] = tasks(tmp_path / "held_out.jsonl", 3)
    calm = drive(settings, tmp_path / "calm", num_steps=4, environment=Talk, validates=True)
    Talk.slow = 0.02
    where = tmp_path / "resumed"
    first = drive(settings, where, num_steps=2, stops=True, environment=Talk, validates=True)
    resumed = drive(settings, where, num_steps=4, record=first, environment=Talk, validates=True)
    assert [step["staleness/mean"] for step in calm.metrics] == [0, 1, 1, 1]
    assert resumed.numbers() == calm.numbers()
    assert "validation/reward/mean" in calm.metrics[0]
    assert equal_weights(resumed, calm)


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
@pytest.mark.parametrize("lockstep", [True, False])
def test_no_episode_is_lost_or_doubled(
    tiny: dict[str, Any], tmp_path: Path, in_flight: str, lockstep: bool
) -> None:
    """F12, 3 and 8: over an epoch with a stop in it every task is trained on once, within the bound,
    and episodes outlive updates."""
    settings = tiny | TRUNCATE
    settings |= {
        "asynchrony.staleness": 1,
        "asynchrony.in_flight": in_flight,
        "episode.lockstep": lockstep,
        "loop.num_epochs": 1,
        "loop.num_steps": None,
    }
    Talk.slow = 0.01
    record = drive(settings, tmp_path / "run", num_steps=3, stops=True, environment=Talk)
    drive(settings, tmp_path / "run", num_steps=6, record=record, environment=Talk)
    assert record.positions == [2, 4, 6, 8, 10, 12]
    assert min(Counter(Talk.ended).values()) == 2  # those in flight at the stop ran again
    assert len(Counter(Talk.ended)) == 12
    assert max(step["staleness/max"] for step in record.metrics) in (1, 2, 3)
    if lockstep:
        assert max(step["staleness/versions_per_row"] for step in record.metrics) > 1


def test_a_group_that_fails_ahead_is_left_out(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Trap 14 with staleness 1: its rows count in no statistic, and its place is given back."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 1, "data.batch_size": 4}
    settings |= {"episode.retries": 1, "episode.max_given_up": 0.5, "data.shuffle": False}
    settings["loop.num_steps"] = 3
    Talk.broken = {"5"}
    record = drive(settings, tmp_path / "run", num_steps=3, environment=Talk)
    assert [step["episode/given_up"] for step in record.metrics].count(2.0) == 1
    assert sum(step["episode/given_up"] for step in record.metrics) == 2.0
    assert sum(step.get("episode/failed/ConnectionError", 0.0) for step in record.metrics) == 4.0
    assert record.positions == [4, 8, 12]


async def one_turn(model: Model, task: dict[str, Any]) -> float:
    reply = await model.reply(task["prompt"])
    return float(len(reply.text) % 5)


def length_reward(*, response: str, **columns: object) -> float:
    return float(len(response) % 5)


def test_an_episode_of_one_turn_is_a_plain_response(tiny: dict[str, Any], tmp_path: Path) -> None:
    """F12, 16, one step ahead in drain mode: losses and weights, bit for bit."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
    settings["loop.num_steps"] = 3
    plain = drive(settings, tmp_path / "plain", num_steps=3, reward=length_reward)
    episodes = drive(settings, tmp_path / "episodes", num_steps=3, environment=one_turn)
    for before, after in zip(plain.numbers(), episodes.numbers(), strict=True):
        assert {name: after[name] for name in before} == before
    assert equal_weights(episodes, plain)


class Hasty:
    """Gives up its first request once the engine is at work, as a client's timeout does, and asks
    again."""

    waits: ClassVar[bool] = True
    slices: ClassVar[int] = 0

    async def __call__(self, model: Model, task: dict[str, Any]) -> float:
        if not self.waits:
            asked, before = asyncio.create_task(model.reply(task["prompt"])), self.slices
            while Hasty.slices == before:
                await asyncio.sleep(0)
            if asked.done():
                return float(len(asked.result().text) % 5)
            asked.cancel()
            await asyncio.wait([asked])
        reply = await model.reply(task["prompt"])
        return float(len(reply.text) % 5)


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_request_that_was_given_up_leaves_no_trace(
    tiny: dict[str, Any], tmp_path: Path, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the engine in the middle of its reply, and the next one draws what it would have."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
    settings |= {"loop.num_steps": 3, "asynchrony.slice_steps": 1, "episode.lockstep": lockstep}
    Hasty.waits = True
    calm = drive(settings, tmp_path / "calm", num_steps=3, environment=Hasty())
    cancelled: list[int] = []
    cancel, run = HfEngine.cancel, HfEngine.run

    def counted_cancel(engine: HfEngine, keys: Iterable[int]) -> None:
        keys = list(keys)
        cancelled.extend(keys)
        cancel(engine, keys)

    def counted_run(engine: HfEngine, *arguments: Any, **options: Any) -> int:
        steps = run(engine, *arguments, **options)
        Hasty.slices += 1
        return steps

    monkeypatch.setattr(HfEngine, "cancel", counted_cancel)
    monkeypatch.setattr(HfEngine, "run", counted_run)
    Hasty.waits = False
    hasty = drive(settings, tmp_path / "hasty", num_steps=3, environment=Hasty())
    assert cancelled
    for before, after in zip(calm.numbers(), hasty.numbers(), strict=True):
        assert after == {name: pytest.approx(value, abs=1e-4) for name, value in before.items()}
