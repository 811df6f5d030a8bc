"""vLLM under the streaming actor against the engine hf, which draws the same tokens in float32: in
one process, where slices do not depend on time, and in a pool of its own on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.asynchrony.runs import TRUNCATE, TWO_POOLS, drive, tiny_settings
from tests.recipes import rewards

VLLM = {"actor.generation.engine": "vllm", "actor.generation.kv_cache_bytes": 2**22}
MODES = [
    "recompute",
    pytest.param("keep", marks=pytest.mark.slow),
    pytest.param("drain", marks=pytest.mark.slow),
]


def one_step_ahead(directory: Path, mode: str) -> dict[str, Any]:
    settings = tiny_settings(directory) | TRUNCATE
    settings |= {"asynchrony.staleness": 1, "asynchrony.in_flight": mode, "loop.num_steps": 6}
    return settings


@pytest.mark.parametrize("mode", MODES)
def test_vllm_draws_what_hf_draws(tmp_path: Path, mode: str) -> None:
    """F12, 9 to 11, in a run: the same tokens under the same versions of the weights, through three
    updates that find rows in flight, and a clean end although others are in flight then."""
    settings = one_step_ahead(tmp_path, mode)
    hf = drive(settings, tmp_path / "hf", num_steps=4)
    vllm = drive(settings | VLLM, tmp_path / "vllm", num_steps=4)
    assert vllm.responses == hf.responses
    for there, here in zip(vllm.metrics, hf.metrics, strict=True):
        staleness = [name for name in here if name.startswith("staleness/")]
        assert len(staleness) == 4
        for name in [*staleness, "actor/policy_loss", "reward/mean"]:
            assert there[name] == pytest.approx(here[name], abs=1e-5), name
    if mode != "drain":
        assert max(step["staleness/versions_per_row"] for step in hf.metrics) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["recompute", "keep", "drain"])
def test_vllm_in_a_pool_of_its_own(tmp_path: Path, mode: str) -> None:
    """In drain mode the losses and weights of one process with the engine hf; in the others every
    row once, within the bound. The run is closed while rows stream."""
    settings = one_step_ahead(tmp_path, mode)
    apart = drive(
        settings | VLLM | TWO_POOLS, tmp_path / "apart", reward=rewards.plain, num_steps=4
    )
    assert apart.positions == [2, 4, 6, 8]
    assert max(step["staleness/max"] for step in apart.metrics) <= 3
    assert all(step["actor/log_prob_gap_max"] < 1 for step in apart.metrics)
    if mode != "drain":
        return
    alone = drive(settings, tmp_path / "alone", reward=rewards.plain, num_steps=4)
    for there, here in zip(apart.numbers(), alone.numbers(), strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4)
