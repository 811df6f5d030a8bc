"""Responses drawn ahead in a pool of their own, on Ray, against the same run in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from controllers.ledger import LEDGER, read_ledger
from hybridflow import open_session, run
from tests.asynchrony.runs import TRUNCATE, TWO_POOLS, drive, tiny_settings
from tests.recipes import rewards

ROOT = Path(__file__).parents[2]


def events(output: Path, name: str) -> list[dict[str, Any]]:
    path = output / "events.jsonl"
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@contextmanager
def killed(output: Path, kills: dict[int, str]) -> Iterator[None]:
    """{1: "generation"}: kills the first rank of that pool while the second step is under way."""
    ended = threading.Event()

    def kill() -> None:
        for step, pool in kills.items():
            while not any(line["step"] >= step for line in read_ledger(output / LEDGER)):
                if ended.wait(0.01):
                    return
            known = [*events(output, "started"), *events(output, "recovered")]
            os.kill(known[-1]["pids"][pool][0], signal.SIGKILL)
            while len(events(output, "recovered")) == len(known) - 1:
                if ended.wait(0.05):
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def recovered(
    settings: dict[str, Any], output: Path, kills: dict[int, str]
) -> dict[str, torch.Tensor]:
    """The weights of a run of which processes are killed."""
    settings = settings | {"output_dir": output}
    with killed(output, kills):
        run("grpo", settings, reward=rewards.plain)
    assert [event["pools"] for event in events(output, "recovered")] == [
        [pool] for pool in kills.values()
    ]
    last = output / "checkpoints" / f"step-{settings['loop.num_steps']:08d}"
    return load_file(last / "huggingface" / "model.safetensors")


@pytest.fixture(scope="module")
def drains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Drain mode, one step ahead: which version draws a response, and with which others, does not
    depend on time."""
    torch.set_num_threads(1)
    settings = tiny_settings(tmp_path_factory.mktemp("model")) | TRUNCATE
    settings |= {"loop.num_steps": 4, "loop.num_epochs": None}
    return settings | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}


def test_two_pools_do_what_one_process_does(drains: dict[str, Any], tmp_path: Path) -> None:
    """Two processes at work at the same time lose and learn what one does."""
    alone = drive(drains, tmp_path / "alone", num_steps=4, reward=rewards.plain)
    apart = drive(drains | TWO_POOLS, tmp_path / "apart", num_steps=4, reward=rewards.plain)
    for here, there in zip(alone.numbers(), apart.numbers(), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-5)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(apart.weights[name], weight, rtol=0, atol=1e-4)
    assert [step["staleness/mean"] for step in apart.metrics] == [0, 1, 1, 1]


@pytest.mark.slow
def test_a_rank_of_each_pool_that_is_killed_costs_no_bit(
    drains: dict[str, Any], tmp_path: Path
) -> None:
    """F12, 8: the kills come while responses stream."""
    settings = drains | TWO_POOLS
    apart = drive(settings, tmp_path / "apart", num_steps=4, reward=rewards.plain)
    weights = recovered(settings, tmp_path / "killed", {1: "generation", 2: "training"})
    for name, weight in apart.weights.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.slow
def test_recompute_stays_within_its_bound_and_validation_finds_one_version(
    drains: dict[str, Any], tmp_path: Path
) -> None:
    settings = drains | TWO_POOLS | {"asynchrony.in_flight": "recompute"}
    settings |= {"data.validation": drains["data.train"], "output_dir": tmp_path / "recompute"}
    with open_session("grpo", settings, reward=rewards.plain) as session:
        steps = []
        for _ in range(4):
            steps.append(session.step())
            session.validate()
        assert session.loop.data.position == 8
    assert max(step["staleness/max"] for step in steps) <= 3
    # Slices that ran during validation are not part of a step.
    assert sum(step.get("seconds/generation.advance", 0.0) for step in steps) > 0


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_killed_ranks_lose_no_row(tmp_path: Path, in_flight: str) -> None:
    """F12, 8: with a window of strict order every step of a run whose ranks are killed trains on the
    rows that it would have trained on, none lost and none doubled."""
    settings = tiny_settings(tmp_path) | TRUNCATE | {"asynchrony.staleness": 2}
    settings |= {"asynchrony.look_ahead": 0.0, "asynchrony.in_flight": in_flight}
    run("grpo", settings | {"output_dir": tmp_path / "whole"}, reward=rewards.plain)
    recovered(settings | TWO_POOLS, tmp_path / "killed", {1: "training", 3: "generation"})
    whole, lines = (read_ledger(tmp_path / name / LEDGER) for name in ("whole", "killed"))
    assert [line["rows"] for line in lines] == [line["rows"] for line in whole]


@pytest.mark.slow
def test_a_stop_while_rows_stream_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle of a step, in drain mode: the controller leaves with the newest step on
    disk, and the run that goes on from there has the ledger and weights of the undisturbed one."""
    settings = tiny_settings(tmp_path) | TRUNCATE
    settings |= {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
    settings |= {"reward.function": "tests.recipes.rewards:plain", "loop.checkpoint_every": 0}
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    arguments = [f"output_dir={stopped}"]
    for name, value in (settings | TWO_POOLS).items():
        arguments.append(f"{name}={str(value).replace(' ', '')}")
    command = [sys.executable, "-m", "recipes.grpo", *arguments]
    with (stopped / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
    while not any(line["step"] >= 2 for line in read_ledger(stopped / LEDGER)):
        assert process.poll() is None, (stopped / "log").read_text()[-3000:]
        time.sleep(0.01)
    (started,) = events(stopped, "started")
    os.kill(started["pid"], signal.SIGTERM)
    assert process.wait(120) == 75, (stopped / "log").read_text()[-3000:]
    run("grpo", settings | TWO_POOLS | {"output_dir": stopped})
    run("grpo", settings | {"output_dir": tmp_path / "whole"})
    whole, lines = (read_ledger(tmp_path / name / LEDGER) for name in ("whole", "stopped"))
    assert [line["rows"] for line in lines] == [line["rows"] for line in whole]
    last = Path("checkpoints") / "step-00000006" / "huggingface" / "model.safetensors"
    weights = load_file(stopped / last)
    for name, weight in load_file(tmp_path / "whole" / last).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)
