"""Whole runs with an adapter: responses that are drawn ahead, and processes that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.asynchrony.runs import TRUNCATE, drive, equal_weights, tiny_settings

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
