"""Episodes in processes of their own (episode.processes): the same draws as in the generation engine's
process, and an environment that ends its process ends no more than that."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import ClusterConfig
from cluster.connect import connect
from hybridflow import Batch, open_session
from hybridflow.context import RankContext
from recipes.preparation import prepare
from recipes.python_api import make_settings
from tests.agents.chat import chat_model, chat_settings
from tests.asynchrony.runs import TRUNCATE, TWO_POOLS, drive
from workers.agents.config import EpisodeConfig
from workers.agents.processes import Processes

APART = {"runtime": "ray", "cluster.address": "local", "episode.processes": 2}


class Fragile:
    """Writes the process of every attempt to a file; the task with answer 1 ends that of its first
    attempt."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def reset(self, task: dict[str, Any]) -> None:
        self.left = int(task["answer"]) % 3
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if task["answer"] == "1":
            with suppress(FileExistsError):  # the first of the group alone
                self.log.with_suffix(".ended").touch(exist_ok=False)
                time.sleep(1.0)  # the others of the process have begun
                os.kill(os.getpid(), signal.SIGKILL)

    async def step(self, action: str) -> tuple[str, bool, float]:
        self.left -= 1
        return f"{self.left} left", self.left < 0, float(len(action))


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def sound(log: Path) -> partial[Fragile]:
    """One that ends nothing."""
    log.with_suffix(".ended").touch()
    return partial(Fragile, log)


def test_processes_draw_what_one_draws(tmp_path: Path) -> None:
    """Also where the environment kills one of them: the episodes in it begin again, with the same
    draws, and the run goes on."""
    settings = chat_settings(tmp_path)
    log = tmp_path / "apart.log"
    runs: list[tuple[dict[str, Any], Any]] = [
        ({"runtime": "local"}, sound(tmp_path / "here.log")),
        (APART, partial(Fragile, log)),
    ]
    batches: list[Batch] = []
    for changes, environment in runs:
        output = {"output_dir": tmp_path / str(changes["runtime"])}
        with open_session("grpo", settings | changes | output, environment=environment) as session:
            batch = session.actor.generate_sequences(next(session.prompts))
            batches.append(batch.local(batch.columns))
            metrics = session.step()
            assert metrics["episode/given_up"] == 0.0
            engines = {pid for pool in session.pools.values() for pid in pool.pids()}
    here, apart = batches
    for column in ("prompt_ids", "response_ids", "loss_mask", "turn_lengths", "turn_rewards"):
        expected, drawn = here.ragged(column), apart.ragged(column)
        assert torch.equal(drawn.lengths, expected.lengths), column
        assert torch.equal(drawn.values, expected.values), column
    assert torch.equal(apart.tensor("episode_rewards"), here.tensor("episode_rewards"))
    torch.testing.assert_close(
        apart.ragged("rollout_log_probs").values,
        here.ragged("rollout_log_probs").values,
        atol=1e-4,
        rtol=0,
    )
    failures = [of_row["failures"] for of_row in apart.objects("episode_metrics")]
    assert sorted(map(tuple, failures)) == [()] * 7 + [("process",)], (
        "the others waited for a reply"
    )
    processes = set(map(int, log.read_text().split()))
    assert len(processes) in (2, 3) and not processes & {os.getpid(), *engines}
    until = time.monotonic() + 60
    while any(is_there(process) for process in processes):
        assert time.monotonic() < until, "they end with the run"
        time.sleep(0.1)


def test_processes_need_ray(tmp_path: Path) -> None:
    settings = chat_settings(tmp_path) | {"episode.processes": 2}
    with pytest.raises(ValueError, match=r"episode\.processes=2 with runtime=local"):
        prepare(make_settings("grpo", settings, None, None, None, sound(tmp_path / "log")))


class EndsElsewhere:
    """An environment that ends every other process that is sent it."""

    def __reduce__(self) -> Any:
        return exit_elsewhere, (os.getpid(),)

    async def __call__(self, model: Any, task: dict[str, Any]) -> float:
        return 0.0


def exit_elsewhere(process: int) -> EndsElsewhere:
    if os.getpid() != process:
        os._exit(1)
    return EndsElsewhere()


@pytest.mark.slow
def test_a_process_that_does_not_start() -> None:
    """One line, and no process is left."""
    with connect(ClusterConfig(address="local"), cpu_slots=2):
        models: Any = None  # nothing is drawn
        context = RankContext(in_ray=True)
        with pytest.raises(ValueError, match=r"episode\.processes=2: one of them ended while"):
            Processes(2, context, EndsElsewhere(), EpisodeConfig(), models)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", ["drain", "keep"])
def test_processes_of_a_pool_that_draws_ahead(tmp_path: Path, in_flight: str) -> None:
    """In drain mode the numbers of one process that nobody kills, otherwise every task once."""
    settings = chat_settings(tmp_path) | TRUNCATE | {"actor.consistency": "warn"}
    settings["model.path"] = chat_model(tmp_path / "wide", hidden_size=64)
    settings |= {
        "asynchrony.staleness": 1,
        "asynchrony.in_flight": in_flight,
        "episode.lockstep": in_flight == "drain",
    }
    there = drive(
        settings | TWO_POOLS | APART,
        tmp_path / "apart",
        environment=partial(Fragile, tmp_path / "apart.log"),
        num_steps=4,
    )
    assert there.positions == [4, 8, 12, 16]
    assert (tmp_path / "apart.ended").exists()
    if in_flight == "drain":
        here = drive(
            settings, tmp_path / "hf", environment=sound(tmp_path / "here.log"), num_steps=4
        )
        for mine, other in zip(here.metrics, there.metrics, strict=True):
            for name in ("reward/mean", "episode/turns", "actor/policy_loss"):
                assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), name
