"""Whole runs with an adapter: responses that are drawn ahead, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridflow import run
from tests.asynchrony.runs import TRUNCATE, drive, equal_weights, tiny_settings
from tests.recovery import test_killed_run as killed_run

DRAIN = TRUNCATE | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
ADAPTER = {"actor.train.lora.rank": 4, "actor.train.optimizer.learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    return tiny_settings(tmp_path) | ADAPTER


def test_responses_drawn_ahead_know_their_adapter(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Drain mode: every step's responses are drawn by the adapter of the step before, and a run that
    stopped at a checkpoint goes on bit for bit, with the responses that waited there."""
    settings = tiny | DRAIN | {"loop.num_steps": 4}
    calm = drive(settings, tmp_path / "calm", num_steps=4)
    first = drive(settings, tmp_path / "resumed", num_steps=2, stops=True)
    resumed = drive(settings, tmp_path / "resumed", num_steps=4, record=first)
    assert [step["staleness/mean"] for step in calm.metrics] == [0, 1, 1, 1]
    assert resumed.responses == calm.responses
    assert resumed.numbers() == calm.numbers()
    assert all("lora_" in name for name in calm.weights)
    assert equal_weights(resumed, calm)


def test_new_adapters_reach_responses_in_flight(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Recompute mode: responses go on under the next adapter, and each token carries its version,
    within the bound."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 1, "loop.num_steps": 4}
    record = drive(settings, tmp_path / "run", num_steps=4)
    assert max(step["staleness/max"] for step in record.metrics) in (1, 2, 3)
    assert max(step["staleness/versions_per_row"] for step in record.metrics) > 1
    gaps = [step["sync/probe_gap"] for step in record.metrics if "sync/probe_gap" in step]
    assert gaps and max(gaps) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_costs_nothing(tmp_path: Path) -> None:
    """An asynchronous run in drain mode with two pools, whose policy has an adapter and rows that two
    ranks share, one of which is killed: responses, numbers and adapter of the undisturbed run in one
    process."""
    tiny = killed_run.settings(tmp_path) | ADAPTER | DRAIN
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    disturbed.mkdir()
    pools = {
        "placement": "custom",
        "pools.policy.roles": "[actor,reference,reward]",
        "pools.policy.num_devices": 2,
        "pools.samples.roles": "[generation]",
        "actor.train.cp": 2,
        "cluster.address": "local",
    }
    arguments = [f"{name}={value}" for name, value in (tiny | pools).items()]
    command = [sys.executable, "-m", "recipes.grpo", *arguments, f"output_dir={disturbed}"]
    with (disturbed / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=killed_run.ROOT, stdout=log, stderr=log, text=True)
    try:
        killed_run.wait_for_step(process, disturbed, 2)
        (started,) = killed_run.events(disturbed, "started")
        os.kill(started["pids"]["policy"][1], signal.SIGKILL)
        status = process.wait(600)
    finally:
        process.terminate()
        process.wait(100)
    assert status == 0, (disturbed / "log").read_text()[-3000:]
    (recovered,) = killed_run.events(disturbed, "recovered")
    assert recovered["pools"] == ["policy"]
    run("grpo", {**tiny, "output_dir": whole, "runtime": "local"})
    for here, there in zip(killed_run.numbers(whole), killed_run.numbers(disturbed), strict=True):
        for name in here.keys() & there.keys():
            if name.startswith("asynchrony/"):  # shares of time
                continue
            value = here[name]
            if not isinstance(value, str):
                value = pytest.approx(value, rel=1e-3, abs=1e-4)
            assert there[name] == value, name
    last = Path("checkpoints") / f"step-{killed_run.NUM_STEPS:08d}" / "huggingface"
    expected = load_file(whole / last / "adapter_model.safetensors")
    weights = load_file(disturbed / last / "adapter_model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-4)
