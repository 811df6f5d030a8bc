"""Stage B of the rehearsal: NCCL's rules, held by groups over gloo (docs/gpu.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.engines.context_attention import Result as Part
from tests.engines.context_attention import inputs, plain
from tests.engines.test_context_attention import CASES as SHARED
from tests.engines.test_context_attention import EXACT
from tests.engines.test_threed import CASES, FP32
from tests.engines.threed_cases import load_plain, plain_run, save_tiny_model
from tests.engines.threed_workers import OPTIMIZER, Case, Job, Result, batches
from tests.experts import divided
from tests.experts.plain import load_mixture, plain_steps, save_tiny_mixture
from tests.experts.test_routers import compare
from tests.matrix import matrix
from tests.ranks import run_ranks
from tests.rehearsal import nccl_cases
from tests.resharding.gloo_cases import NUM_RANKS, SOURCES
from workers.engines.base import Head

PIPELINES = [Case(p=2, d=2, virtual=2, model="llama-tied"), Case(p=2, t=2)]
SLOW = [case for case in CASES if case.world_size > 1 and case not in PIPELINES]


def test_what_nccl_does_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    """The two last but one: the transport of resharding with its batches or its first collective
    taken back. One rank of two notices where they differ."""
    run_ranks(nccl_cases.breaches, (str(tmp_path),), 2)
    texts = [json.loads((tmp_path / f"breaches{rank}.json").read_text()) for rank in range(2)]
    for breach, expected in nccl_cases.BREACHES.items():
        name = breach.__name__
        refused = [text[name] for text in texts if name in text]
        if not expected:
            assert not refused
            continue
        assert refused and all(expected in line and "\n" not in line for line in refused), name
        alone = name in ("other_sizes", "other_order", "written_early")
        assert len(refused) == (1 if alone else 2), name


def test_resharding_holds_the_rules(tmp_path: Path) -> None:
    """All pairs of layouts, and two pools over a group of their own (G14's kind of fault)."""
    run_ranks(nccl_cases.resharding, (str(tmp_path),), NUM_RANKS)
    for rank in range(NUM_RANKS):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "model.embed_tokens.weight" in result["faults"]
        for source in SOURCES:
            for row in result[source].values():
                assert row["received"] == row["bound"]


@pytest.mark.slow
def test_rows_that_ranks_share_hold_the_rules(tmp_path: Path) -> None:
    """Heads exchanged, keys gathered, and a ring whose keys and gradients are on their way at the same
    time: NCCL has no tags, and the order of the messages alone says which is which."""
    cases = [case for case in SHARED if case.window is None]
    run_ranks(nccl_cases.rows_that_ranks_share, (tmp_path, cases), 4)
    for case in cases:
        *parts, weights, sinks = inputs(case.dtype)
        for part in parts:
            part.requires_grad_()
        expected = plain(*parts, sinks, case)
        gradients = torch.autograd.grad((weights * expected).sum(), parts)
        for rank in range(case.world_size):
            path = tmp_path / f"{case.name}.{rank}.pt"
            result: Part = torch.load(path, weights_only=False)
            assert_close(result.output, expected[result.tokens], rtol=0.0, atol=EXACT)
            for gradient, whole in zip(result.gradients[:3], gradients, strict=True):
                assert_close(gradient, whole[result.tokens], rtol=0.0, atol=10 * EXACT)


@pytest.mark.slow
def test_divided_experts_hold_the_rules(tmp_path: Path) -> None:
    """Tokens that travel to their experts, with gathered and with whole layers: the numbers of one plain
    process."""
    save_tiny_mixture(tmp_path / "qwen3_moe", "qwen3_moe")
    cases = [
        divided.Case(ep=4, settings=(("tp", 2), ("activation_checkpointing", True))),
        divided.Case(engine="threed", ep=4),
    ]
    run_ranks(nccl_cases.divided_experts, (tmp_path, cases), 4)
    model = load_mixture(tmp_path / "qwen3_moe")
    expected = plain_steps(model, divided.batches(), divided.COEFFICIENT)
    for case in cases:
        for rank in range(case.world):
            path = tmp_path / f"{case.name}.{rank}.pt"
            result: divided.Result = torch.load(path, weights_only=False)
            for metrics, step in zip(result.metrics, expected, strict=True):
                compare(metrics, step)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    root = tmp_path_factory.mktemp("ruled")
    cases: list[Case] = selected("case")
    for model in sorted({case.model for case in cases}):
        family = model.removesuffix("-tied")
        tied = model.endswith("-tied") or family.startswith("gemma")
        save_tiny_model(root / model, family, tied=tied)
    for head in (Head.value, Head.score):
        if any(case.head is head for case in cases):
            load_plain(root / "llama", head).save_pretrained(root / f"llama-{head.value}")
    worlds: list[tuple[int, list[Job]]] = []
    for size in (4, 2):
        jobs: list[Job] = [("train", case) for case in cases if case.world_size == size]
        if jobs:  # a world that ends at once may end before its last rank has joined
            worlds.append((size, jobs))
    run_ranks(nccl_cases.pipelines, (root, worlds), 4)
    return root


@pytest.mark.parametrize("case", matrix(PIPELINES, SLOW), ids=lambda case: case.name)
def test_pipelines_hold_the_rules(root: Path, case: Case) -> None:
    """Messages of a tick in one batch, collectives in one order (G26): the losses of one plain
    process."""
    folder = case.model if case.head is Head.lm else f"{case.model}-{case.head.value}"
    plain = plain_run(load_plain(root / folder, case.head), case.head, batches(case), OPTIMIZER)
    for rank in range(case.world_size):
        result: Result = torch.load(root / case.name / f"result{rank}.pt", weights_only=False)
        losses = [step["loss"] for step in result.metrics]
        assert_close(losses, plain.losses, rtol=FP32, atol=FP32)
