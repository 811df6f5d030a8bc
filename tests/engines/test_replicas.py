"""Engine fsdp with replicas of its shards (HSDP) on four ranks, 2 x 2, beside one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig

from hybridflow.resharding import Box, ParameterSpec, ShardMap, compile, verify
from tests.engines.replica_workers import CASES, run
from tests.engines.switch_workers import Case
from tests.engines.threed_cases import save_tiny_model
from tests.ranks import run_ranks
from workers.config import TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.threed.engine import ThreeDEngine

SAME = 1e-6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    save_tiny_model(folder / "llama", "llama", layers=2)
    run_ranks(run, (folder, selected("case") or CASES[:1]), 4)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(root: Path, case: Case) -> None:
    """Losses, gradient norms and weights of three steps; the last rank has no rows."""
    found, expected = (
        torch.load(root / f"{name}.pt", weights_only=False)
        for name in (case.name, f"{case.name}-alone")
    )
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=SAME, abs=SAME)
    for name, weights in expected.weights.items():
        assert_close(found.weights[name], weights, rtol=0.0, atol=SAME, msg=name)


def test_a_snapshot_has_every_element_once(root: Path) -> None:
    """Of the first replica; every rank has its shards, and each shard two holders."""
    stored, held, weights = torch.load(root / "snapshot-2x2.pt", weights_only=False)
    for name, value in weights.items():
        for prefix in ("model", "exp_avg", "exp_avg_sq"):
            elements = count(stored, f"{prefix}.{name}")
            assert sum(elements) == value.numel(), name
            assert not any(elements[2:])
        assert sum(count(held, name)) == 2 * value.numel()
        assert count(held, name)[:2] == count(held, name)[2:]


def count(ranks: list[Any], name: str) -> list[int]:
    return [sum(box.numel for box in dict(listed)[name]) for listed in ranks]


def test_a_sync_receives_the_lower_bound_within_each_replica(root: Path) -> None:
    """For every rank the half that it lacks, from its own machine where a replica is one."""
    _, held, weights = torch.load(root / "snapshot-2x2.pt", weights_only=False)
    specs = [ParameterSpec(name, tuple(value.shape), "float32") for name, value in weights.items()]
    boxes = {}
    for rank, listed in enumerate(held):
        boxes[rank] = [(name, box) for name, of_rank in listed for box in of_rank]
    source = ShardMap.of(specs, boxes, num_ranks=4)
    whole = [(spec.name, Box((0,) * len(spec.shape), spec.shape)) for spec in specs]
    target = ShardMap.of(specs, dict.fromkeys(range(4), whole), num_ranks=4)
    plan = compile(source, target, nodes=[0, 0, 1, 1])
    certificate = verify(plan)
    assert certificate.received_total == certificate.bound_total == 2 * target.num_bytes
    assert certificate.between_machines_bytes == 0


@pytest.mark.parametrize("way", ["2x2-to-plain", "plain-to-2x2", "2x2-to-2x2"])
def test_training_goes_on_from_either_snapshot(root: Path, way: str) -> None:
    weights = torch.load(root / f"{way}.pt", weights_only=False)
    *_, expected = torch.load(root / f"snapshot-{way.split('-')[0]}.pt", weights_only=False)
    for name, value in expected.items():
        assert_close(weights[name], value, rtol=0.0, atol=0.0 if way == "2x2-to-2x2" else SAME)
    if way == "2x2-to-2x2":
        saved = load_file(root / "saved" / "model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in weights.items())


@pytest.mark.parametrize(("replicas", "ep"), [(3, 1), (4, 1), (0, 1), (2, 2)])
def test_replicas_that_do_not_fit_are_refused(replicas: int, ep: int) -> None:
    config = TrainConfig(fsdp_replicas=replicas, ep=ep)
    model = AutoConfig.for_model("llama")
    message = "fsdp_replicas" if ep == 1 else "ep"
    with pytest.raises(ValueError, match=message):
        FsdpEngine.check(model, config, Head.lm, 4)
    with pytest.raises(ValueError, match="fsdp_replicas"):
        ThreeDEngine.check(model, TrainConfig(fsdp_replicas=2), Head.lm, 4)
