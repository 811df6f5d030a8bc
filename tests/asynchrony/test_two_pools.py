"""Responses drawn ahead in a pool of their own, on Ray, against the same run in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridflow import open_session
from tests.asynchrony.runs import TRUNCATE, drive, tiny_settings
from tests.recipes import rewards

TWO_POOLS = {
    "runtime": "ray",
    "placement": "custom",
    "pools.training.num_devices": 1,
    "pools.training.roles": ["actor", "reference", "reward"],
    "pools.generation.num_devices": 1,
    "pools.generation.roles": ["generation"],
    "threads_per_device": 1,
    "cluster.address": "local",
}


def test_two_pools_do_what_one_process_does(tmp_path: Path) -> None:
    """Drain mode, one step ahead: which version draws a response, and with which others, does not
    depend on time, so that two processes at work at the same time lose and learn what one does. In
    a cluster of the next session recompute mode stays within its bound, and validation finds one
    version."""
    torch.set_num_threads(1)
    settings = tiny_settings(tmp_path) | TRUNCATE | {"asynchrony.staleness": 1}
    settings |= {"loop.num_steps": 4, "loop.num_epochs": None}
    drains = settings | {"asynchrony.in_flight": "drain"}
    alone = drive(drains, tmp_path / "alone", num_steps=4, reward=rewards.plain)
    apart = drive(drains | TWO_POOLS, tmp_path / "apart", num_steps=4, reward=rewards.plain)
    for here, there in zip(alone.numbers(), apart.numbers(), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-5)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(apart.weights[name], weight, rtol=0, atol=1e-4)
    assert [step["staleness/mean"] for step in apart.metrics] == [0, 1, 1, 1]

    settings |= TWO_POOLS | {"data.validation": settings["data.train"]}
    with open_session(
        "grpo", settings | {"output_dir": tmp_path / "recompute"}, reward=rewards.plain
    ) as session:
        steps = []
        for _ in range(4):
            steps.append(session.step())
            session.validate()
        assert session.loop.data.position == 8
    assert max(step["staleness/max"] for step in steps) <= 3
    # Slices that ran during validation are not part of a step.
    assert sum(step.get("seconds/generation.advance", 0.0) for step in steps) > 0
