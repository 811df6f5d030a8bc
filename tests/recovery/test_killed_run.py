"""A run on Ray whose processes are killed ends with the weights, the ledger and the numbers of the
undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from controllers.ledger import LEDGER, first_difference, read_ledger
from hybridflow import run
from hybridflow.supervisor import descendants
from tests.tiny import make_data, make_model

ROOT = Path(__file__).parents[2]
CLOCKS = re.compile(r"seconds|tokens_per_s|time_s|sync/.*_(s|bytes)$|memory")
NUM_STEPS = 5


def settings(directory: Path) -> dict[str, Any]:
    return {
        "model.path": make_model(directory / "model", layers=1),
        "data.train": make_data(directory / "prompts.jsonl", rows=8),
        "data.batch_size": 4,
        "algorithm.samples_per_prompt": 2,
        "algorithm.num_mini_batches": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-2,
        "reward.function": "tests.recipes.rewards:plain",
        "threads_per_device": 1,
        "loop.num_steps": NUM_STEPS,
        "metrics.console": False,
    }


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics that a run logged, without those that a clock or a transfer decides."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not CLOCKS.search(name)} for row in rows]


def events(output: Path, *names: str) -> list[dict[str, Any]]:
    path = output / "events.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] in names]


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    deadline = time.monotonic() + 800
    while not any(line["step"] >= step for line in read_ledger(output / LEDGER)):
        assert process.poll() is None, (output / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, (output / "log").read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.timeout(1800)
def test_a_killed_rank_and_a_killed_controller_cost_no_bit(tmp_path: Path) -> None:
    """FAULTS C3 to C5, R9 to R11: only the policy's pool is restarted, the generation pool joins
    anew; then the supervisor starts the controller again. The undisturbed run is in this
    process."""
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    tiny = settings(tmp_path)
    disturbed.mkdir()
    pools = {"placement": "custom", "pools.policy.roles": "[actor,reference,reward]"}
    pools |= {"pools.samples.roles": "[generation]", "cluster.address": "local"}
    arguments = [f"{name}={value}" for name, value in (tiny | pools).items()]
    command = [sys.executable, "-m", "recipes.grpo", *arguments, f"output_dir={disturbed}"]
    with (disturbed / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
    try:
        wait_for_step(process, disturbed, 1)
        (started,) = events(disturbed, "started")
        os.kill(started["pids"]["policy"][0], signal.SIGKILL)
        wait_for_step(process, disturbed, 3)
        (recovered,) = events(disturbed, "recovered")
        assert recovered["pools"] == ["policy"]
        assert recovered["pids"]["samples"] == started["pids"]["samples"]
        os.kill(started["pid"], signal.SIGKILL)
        status = process.wait(300)
    finally:
        process.terminate()
        process.wait(100)
    assert status == 0, (disturbed / "log").read_text()[-3000:]
    assert not descendants(process.pid)
    failures = events(disturbed, "failure")
    assert [(failure["kind"], failure["pool"], failure["role"]) for failure in failures] == [
        ("died", "policy", failures[0]["role"]),
        ("died", "", "controller"),
    ]
    run("grpo", {**tiny, "output_dir": whole, "runtime": "local"})
    assert first_difference(whole / LEDGER, disturbed / LEDGER) is None
    assert numbers(disturbed) == numbers(whole)
    last = Path("checkpoints") / f"step-{NUM_STEPS:08d}" / "huggingface" / "model.safetensors"
    weights, expected = load_file(disturbed / last), load_file(whole / last)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
