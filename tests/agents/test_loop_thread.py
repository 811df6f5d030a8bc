"""Code of an episode that would end the loop of all, or does not end itself."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.agents.test_executor import run
from workers.agents.config import EpisodeConfig
from workers.agents.model import Model
from workers.agents.outcome import EnvironmentMistake

GO = [{"role": "user", "content": "Go"}]


async def leaves() -> None:
    sys.exit(4)


def ends_the_loop(way: str) -> None:
    loop = asyncio.get_running_loop()
    match way:
        case "a task":
            loop.create_task(leaves())  # noqa: RUF006 it is left behind
        case "a callback":
            loop.call_soon(sys.exit, 4)
        case "stop":
            loop.stop()


@pytest.mark.parametrize("way", ["a task", "a callback", "stop"])
def test_no_code_ends_the_loop_of_all(way: str) -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        await model.reply(GO)
        if task["row"] == 1:
            ends_the_loop(way)
        await asyncio.sleep(0.01)
        await model.reply(GO)
        return float(task["row"])

    finished, rounds = run(episode, 3)
    assert [len(rows) for rows in rounds] == [3, 3]
    assert [episode.outcome.reward for episode in finished if episode.outcome] == [0.0, 1.0, 2.0]


def test_an_exit_in_a_task_that_is_awaited_is_a_failure() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        await model.reply(GO)
        if task["row"] == 1:
            await asyncio.gather(leaves(), asyncio.sleep(0))
        return 1.0

    finished, _ = run(episode, 3)
    assert [episode.outcome is None for episode in finished] == [False, True, False]
    assert [failure.kind for failure in finished[1].failures] == ["RuntimeError"] * 2
    assert "SystemExit: 4" in finished[1].failures[0].text


def test_tasks_that_are_left_behind_end_with_the_loop() -> None:
    """Nobody waits for them, and what they have open is closed."""
    closed = []

    async def watches(row: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            closed.append(row)

    async def episode(model: Model, task: dict[str, Any]) -> float:
        behind.append(asyncio.create_task(watches(task["row"])))
        await model.reply(GO)
        return 1.0

    behind: list[asyncio.Task[None]] = []
    began = time.perf_counter()
    run(episode, 3)
    assert time.perf_counter() - began < 5 and sorted(closed) == [0, 1, 2]


def test_code_that_goes_on_after_its_time_out_is_named() -> None:
    """A loop that catches CancelledError would hold the others for ever."""
    num_tries = 0

    async def episode(model: Model, task: dict[str, Any]) -> float:
        nonlocal num_tries
        await model.reply(GO)
        while task["row"] == 1 and num_tries < 5:
            try:
                await asyncio.sleep(60)  # here
            except asyncio.CancelledError:
                num_tries += 1
        return 1.0

    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + [text.endswith("# here") for text in lines].index(True)
    told = rf"^environment=test: .*timeout_s=0.1, was cancelled 4 times, .* at {__file__}, line {line};"
    with pytest.raises(EnvironmentMistake, match=told):
        run(episode, 3, EpisodeConfig(step_timeout_s=0.1, retries=0))
    assert num_tries == 5, "four for the time, one at the end"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_without_a_text_is_a_failure() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        await model.reply(GO)
        raise Silent

    finished, _ = run(episode, 1)
    (first, _) = finished[0].failures
    assert first.kind == "Silent" and first.text.startswith("Silent: an error without a text (")
