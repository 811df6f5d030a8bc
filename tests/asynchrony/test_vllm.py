"""vLLM under the streaming actor against the engine hf, which draws the same tokens in float32: in
one process, and in a pool of its own on Ray."""

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
    """F12, 9 to 11, in a run: every row once, through three updates that find rows in flight, and a
    clean end although others are in flight then. The same tokens as of the engine hf under the same
    weights; vLLM's probe of a sync goes on with rows in flight, so that later tokens of theirs have
    other versions than hf's unless the mode is drain."""
    settings = one_step_ahead(tmp_path, mode)
    hf = drive(settings, tmp_path / "hf", num_steps=4)
    vllm = drive(settings | VLLM, tmp_path / "vllm", num_steps=4)
    assert vllm.rows == hf.rows
    assert vllm.responses[:4] == hf.responses[:4]
    for there in vllm.metrics:
        assert there["staleness/max"] <= 2
        if there["staleness/max"] == 0:
            assert there["actor/log_prob_gap_max"] < 1e-4
    if mode != "drain":
        assert max(step["staleness/versions_per_row"] for step in vllm.metrics) > 1
        return
    assert vllm.responses == hf.responses
    for there, here in zip(vllm.metrics, hf.metrics, strict=True):
        for name in ("staleness/mean", "actor/policy_loss", "reward/mean"):
            assert there[name] == pytest.approx(here[name], abs=1e-5), name


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
