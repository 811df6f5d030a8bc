"""Attention over rows that ranks share, forward and backward, for every exchange."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.engines.context_attention import TOKENS, Case, Result, inputs, plain, run
from tests.ranks import run_ranks
from workers.config import ContextExchange

EXACT = 1e-9
"""Of float64; a soft cap's softmax without a ring is in float32."""
CASES = []
for exchange in (ContextExchange.ulysses, ContextExchange.allgather, ContextExchange.ring):
    for world_size in (2, 4):
        CASES += [
            Case(exchange=exchange, world_size=world_size),
            Case(exchange=exchange, world_size=world_size, window=4),
            Case(exchange=exchange, world_size=world_size, window=9, softcap=1.0),
            Case(exchange=exchange, world_size=world_size, window=9, has_sinks=True),
        ]
CASES.append(Case(exchange=ContextExchange.ring, world_size=4, tile_elements=64))
HALF = [
    Case(exchange=ContextExchange.ring, world_size=size, dtype=torch.bfloat16) for size in (2, 4)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    root = tmp_path_factory.mktemp("attention")
    run_ranks(run, (root, selected("case")), 4)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_attention_by_its_definition(root: Path, case: Case) -> None:
    """Outputs and the gradients of queries, keys and values against a loop over tokens, and the
    gradients against differences of the shared pass itself: keys that are stale in the backward
    pass, as in finding T19, give another slope. Segments of 1 to 30 tokens, two of them after one
    prompt; parts of uneven sizes."""
    tolerance = 1e-6
    if case.softcap is None or case.exchange is ContextExchange.ring:
        tolerance = EXACT
    *parts, weights, sinks = inputs(case.dtype)
    for part in (*parts, sinks):
        part.requires_grad_()
    expected = plain(*parts, sinks, case)
    loss = (weights * expected).sum()
    *gradients, of_sinks = torch.autograd.grad(loss, [*parts, sinks], allow_unused=True)
    seen, shares = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(len(sinks))
    for rank in range(case.world_size):
        result: Result = torch.load(root / f"{case.name}.{rank}.pt", weights_only=False)
        seen[result.tokens] += 1
        assert_close(result.output, expected[result.tokens], rtol=0.0, atol=tolerance)
        for gradient, whole in zip(result.gradients[:3], gradients, strict=True):
            assert_close(gradient, whole[result.tokens], rtol=0.0, atol=10 * tolerance)
        assert result.analytic == pytest.approx(
            result.numeric, rel=1e-4 if tolerance > EXACT else 1e-6
        )
        if case.has_sinks:
            shares = shares + result.gradients[3]
    assert bool((seen == 1).all())
    if case.has_sinks:
        assert_close(shares, of_sinks, rtol=0.0, atol=10 * tolerance)


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_a_longer_ring_rounds_no_more_often(root: Path, case: Case) -> None:
    """Finding T28: in bfloat16 the outputs of parts are merged in float32, and so are gradients on
    their way round, so that each number is rounded once, however many ranks there are."""
    *parts, weights, sinks = inputs(case.dtype)
    exact = [part.double().requires_grad_() for part in parts]
    expected = plain(*exact, sinks.double(), case)
    gradients = torch.autograd.grad((weights.double() * expected).sum(), exact)
    for rank in range(case.world_size):
        result: Result = torch.load(root / f"{case.name}.{rank}.pt", weights_only=False)
        places = result.tokens
        assert_close(result.output.double(), expected[places], rtol=2**-8, atol=1e-6)
        for gradient, whole in zip(result.gradients, gradients, strict=True):
            # The rounded output enters the gradient of queries and keys.
            assert_close(gradient.double(), whole[places], rtol=2**-7, atol=2**-6)
