"""A run whose worker processes are killed ends with the weights and the numbers of the undisturbed
run, in the same controller."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hybridflow import run
from tests.tiny import make_data, make_model

CLOCKS = re.compile(r"seconds|tokens_per_s|time_s|sync/.*_(s|bytes)$|memory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tiny")
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
        "loop.num_steps": 6,
        "loop.checkpoint_every": 1,
        "metrics.console": False,
        "cluster.worker_logs": False,
    }


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics that a run logged, without those that a clock or a transfer decides."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not CLOCKS.search(name)} for row in rows]


def events(output: Path, event: str) -> list[dict[str, Any]]:
    path = output / "events.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def kill_at(output: Path, lines: int, titles: tuple[str, ...]) -> None:
    """Kills a host of this process' cluster as soon as the run has logged so many lines; Ray names
    a host by its pool and rank, or by the call that it is in."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            for child in psutil.Process().children(recursive=True):
                if child.name().startswith(titles):
                    os.kill(child.pid, signal.SIGKILL)
                    return
        time.sleep(0.05)


@pytest.mark.timeout(400)
def test_two_killed_ranks_cost_their_steps_and_no_bit(
    ray_cluster: None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """FAULTS C3, R9, R10, R11: only the pool of the dead rank is restarted, the other's process
    joins anew, metrics.jsonl has every step once. The undisturbed run is one in this process."""
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run("grpo", {**tiny, "output_dir": whole, "runtime": "local"})
    titles = ("ray::policy/", "ray::actor.", "ray::reward."), ("ray::samples/", "ray::generation.")
    killer = threading.Thread(
        target=lambda: [kill_at(disturbed, 1, titles[0]), kill_at(disturbed, 4, titles[1])]
    )
    killer.start()
    pools = {"placement": "custom", "pools.policy.roles": ["actor", "reference", "reward"]}
    pools |= {"pools.samples.roles": ["generation"]}
    outcome = run("grpo", {**tiny, **pools, "output_dir": disturbed})
    killer.join()
    assert outcome.num_steps == 6
    failures, recoveries = events(disturbed, "failure"), events(disturbed, "recovered")
    assert [(failure["kind"], failure["pool"], failure["rank"]) for failure in failures] == [
        ("died", "policy", 0),
        ("died", "samples", 0),
    ]
    assert [recovered["pools"] for recovered in recoveries] == [["policy"], ["samples"]]
    assert numbers(disturbed) == numbers(whole)
    last = Path("checkpoints") / "step-00000006" / "huggingface" / "model.safetensors"
    weights, expected = load_file(disturbed / last), load_file(whole / last)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
