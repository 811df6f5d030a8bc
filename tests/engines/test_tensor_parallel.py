"""Tensor and pipeline parallelism on models of odd shape (REALITY A3, A4) against one process:
vocabularies, MLPs and key-value heads that do not divide, fused projections, norms over all
heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.engines.split_families import SPLIT, odd_model
from tests.engines.threed_cases import load_plain, plain_run
from tests.engines.threed_workers import OPTIMIZER, Case, Job, Result, batches, run_worlds
from tests.matrix import matrix
from tests.ranks import run_ranks

TOLERANCE = 1e-5
Model = tuple[str, int, bool]
"""Model type, key-value heads of 6 query heads, tied embeddings."""

QUICK_FAMILIES = ["phi3", "glm4", "olmo2", "gpt_neox", "starcoder2", "gemma2"]
"""Fused queries, keys and values; a fused MLP; norms over all heads; heads that are interleaved in
one projection; biases of row-parallel layers; soft caps."""
QUICK: list[tuple[int, Model]] = [
    *((2, (family, 3, True)) for family in QUICK_FAMILIES),
    *((3, (family, 2, False)) for family in QUICK_FAMILIES),
    (2, ("llama", 1, False)),
]
SLOW: list[tuple[int, Model]] = [
    *((2, (family, 2, False)) for family in SPLIT),
    *((2, (family, 1, True)) for family in SPLIT if family not in QUICK_FAMILIES),
    *((3, (family, 3, True)) for family in SPLIT),
]
ENGINES = [
    Case(t=2, model="phi3", engine="fsdp"),
    Case(t=3, model="llama-tied"),
    Case(p=2, model="phi", num_rows=4),
]
SLOW_ENGINES = [
    Case(t=2, model="olmo2"),
    Case(t=2, model="glm4", engine="fsdp"),
    Case(t=3, model="phi3"),
    Case(t=3, model="llama-tied", engine="fsdp"),
    Case(p=2, model="gpt_neox", num_rows=4),
    Case(p=2, model="granite", num_rows=4),
]
RESUMED = [Case(t=2, model="phi3"), Case(d=2, model="phi3")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """All worlds, one after the other in the same processes."""
    root = tmp_path_factory.mktemp("tensor_parallel")
    cases = selected("case")
    for name in {"phi3", *(case.model for case in cases)}:
        family, _, tied = name.partition("-")
        odd_model(family, tied=bool(tied)).save_pretrained(root / name)
    worlds: list[tuple[int, list[Job]]] = []
    for size in (3, 2):
        models = [model for world, model in selected("split") if world == size]
        jobs: list[Job] = [("split", models)]
        jobs += [("train", case) for case in cases if case.world_size == size]
        worlds.append((size, jobs))
    worlds[1][1].append(("save_and_resume", RESUMED))
    run_ranks(run_worlds, (root, worlds), 3)
    return root


def _name(split: tuple[int, Model]) -> str:
    size, (family, kv_heads, tied) = split
    return f"tp{size}-{family}-kv{kv_heads}" + ("-tied" if tied else "")


@pytest.mark.parametrize("split", matrix(QUICK, SLOW), ids=_name)
def test_numbers_and_gradients_equal_one_process(root: Path, split: tuple[int, Model]) -> None:
    """A3, A4: log-probs, entropies, and every parameter's gradient, replicas summed once."""
    size, model = split
    assert torch.load(root / f"differences-{size}.pt")[model] < TOLERANCE


@pytest.mark.parametrize("case", matrix(ENGINES, SLOW_ENGINES), ids=lambda case: case.name)
def test_training_equals_plain_pytorch(root: Path, case: Case) -> None:
    """Losses, gradient norms and exported weights of three steps; the export is transformers'."""
    start = load_plain(root / case.model, case.head)
    expected = plain_run(start, case.head, batches(case), OPTIMIZER)
    results: list[Result] = []
    for rank in range(case.world_size):
        file = root / case.name / f"result{rank}.pt"
        results.append(torch.load(file, weights_only=False))
    steps = results[0].metrics
    assert all(result.metrics == steps for result in results)
    tolerance = {"rtol": TOLERANCE, "atol": TOLERANCE}
    assert_close([step["loss"] for step in steps], expected.losses, **tolerance)
    assert_close([step["grad_norm"] for step in steps], expected.grad_norms, **tolerance)
    weights = load_plain(root / case.name, case.head).state_dict()
    trained = {name: weights[name] for name in expected.parameters}
    assert_close(trained, expected.parameters, **tolerance)
    shown: dict[str, torch.Tensor] = {}
    for file in (root / case.name / "shards").glob("*.safetensors"):
        shown |= load_file(file)
    assert all(torch.equal(shown[name], weights[name]) for name in shown)
    outputs = results[-1].outputs
    assert outputs is not None
    assert_close(outputs["log_probs"], expected.outputs.log_probs, **tolerance)
    assert_close(outputs["entropy"], expected.outputs.entropy, **tolerance)


@pytest.mark.parametrize("place", ["0", "1", "fsdp"])
def test_a_checkpoint_of_fused_parts_resumes_on_any_layout(root: Path, place: str) -> None:
    """Each tensor rank holds several boxes of a fused projection; the checkpoint has it whole."""
    resumed, never = (
        load_file(root / folder / "model.safetensors")
        for folder in (f"resumed-{place}", "resumed-never")
    )
    assert_close(resumed, never, rtol=TOLERANCE, atol=TOLERANCE)
