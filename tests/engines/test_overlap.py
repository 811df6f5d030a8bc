"""Engine threed: reductions that begin while the backward pass goes on, beside one at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.engines.switch_workers import Case, run_worlds
from tests.engines.threed_cases import save_tiny_model
from tests.ranks import run_ranks

CASES = [
    Case(name="dp", world_size=2, train={"engine": "threed"}),
    Case(name="bf16", world_size=2, train={"engine": "threed", "precision": "bf16"}),
    Case(name="tp", world_size=4, train={"engine": "threed", "tp": 2}),
    Case(name="pp", world_size=4, train={"engine": "threed", "pp": 2}, model="tied"),
    Case(name="idle", world_size=4, train={"engine": "threed"}),
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    save_tiny_model(folder / "llama", "llama")
    save_tiny_model(folder / "tied", "llama", tied=True)
    cases = list[Case]()
    for case in selected("case"):
        cases += [case, replace(case, name=f"{case.name}-buckets", buckets=3000)]
    run_ranks(run_worlds, (folder, cases), 4)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_buckets_change_nothing_and_begin_early(root: Path, case: Case) -> None:
    """Losses and weights of three steps; only the norm is added up in another order. Of four data
    ranks one has no micro-batch and one begins when the others do."""
    whole, buckets = (
        torch.load(root / f"{name}.pt", weights_only=False)
        for name in (case.name, f"{case.name}-buckets")
    )
    assert buckets.groups > whole.groups
    assert buckets.early == buckets.groups
    for ours, theirs in zip(buckets.metrics, whole.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    for name, weights in whole.weights.items():
        assert_close(buckets.weights[name], weights, rtol=0.0, atol=1e-7, msg=name)
