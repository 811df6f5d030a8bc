"""A run with images whose processes are killed ends with the weights of the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from controllers.ledger import LEDGER, first_difference
from hybridflow import run
from hybridflow.supervisor import descendants
from tests.images.runs import settings
from tests.recovery.test_killed_run import ROOT, events, numbers, wait_for_step

NUM_STEPS = 5
LAST = Path("checkpoints") / f"step-{NUM_STEPS:08d}" / "huggingface" / "model.safetensors"
POOLS = {
    "placement": "custom",
    "pools.policy.roles": "[actor,reference,reward]",
    "pools.samples.roles": "[generation]",
    "cluster.address": "local",
    "runtime": "ray",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_killed_rank_and_a_killed_controller_cost_no_bit(tmp_path: Path, engine: str) -> None:
    """The pool that trains is killed, then the one that generates, then the controller. The undisturbed
    run is in this process."""
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    disturbed.mkdir()
    tiny: dict[str, Any] = settings(tmp_path) | {
        "data.batch_size": 4,
        "actor.generation.engine": engine,
        "reward.function": "tests.images.rewards:by_length",
        "threads_per_device": 1,
        "loop.num_steps": NUM_STEPS,
        "metrics.console": False,
    }
    arguments = [f"{name}={value}" for name, value in (tiny | POOLS).items()]
    command = [sys.executable, "-m", "recipes.grpo", *arguments, f"output_dir={disturbed}"]
    with (disturbed / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
    try:
        wait_for_step(process, disturbed, 1)
        (started,) = events(disturbed, "started")
        os.kill(started["pids"]["policy"][0], signal.SIGKILL)
        wait_for_step(process, disturbed, 2)
        os.kill(started["pids"]["samples"][0], signal.SIGKILL)
        wait_for_step(process, disturbed, 3)
        os.kill(started["pid"], signal.SIGKILL)
        status = process.wait(300)
    finally:
        process.terminate()
        process.wait(100)
    assert status == 0, (disturbed / "log").read_text()[-3000:]
    assert not descendants(process.pid)
    kills = [(failure["kind"], failure["pool"]) for failure in events(disturbed, "failure")]
    assert kills == [("died", "policy"), ("died", "samples"), ("died", "")]
    run("grpo", {**tiny, "output_dir": whole})
    assert first_difference(whole / LEDGER, disturbed / LEDGER) is None
    assert numbers(disturbed) == numbers(whole)
    weights, expected = load_file(disturbed / LAST), load_file(whole / LAST)
    assert any("visual" in name for name in expected)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
