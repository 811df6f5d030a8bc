"""Soft-capped attention over long rows: some queries at a time, and never all scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from workers.engines.model import capped_attention

SHAPES = ((2, 4, 60, 16), (2, 2, 75, 16), (2, 2, 75, 24))
"""Queries, keys and values: rows, heads, time, head_dim; 15 tokens of a prompt stand before each row."""


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operation(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def run(dtype: torch.dtype, window: int | None) -> tuple[list[Tensor], int]:
    """Output and gradients, and elements of the largest tensor."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES
    ]
    with Largest() as largest:
        output = capped_attention.capped(*leaves, 0.3, window, 1.5)
        output.float().square().sum().backward()
    found = [output.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found, largest.elements


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_equal_the_whole(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 16: outputs and gradients, and no tensor of a row's tokens x tokens in either pass."""
    whole, of_whole = run(dtype, window)
    monkeypatch.setattr(capped_attention, "MOST_SCORES", 4 * 75 * 13)
    monkeypatch.setattr(capped_attention, "FEWEST_QUERIES", 8)
    parts, of_parts = run(dtype, window)
    tolerance = 1e-6 if dtype is torch.float32 else 0.02
    for one, other in zip(parts, whole, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert of_whole == 2 * 4 * 60 * 75
    inputs = max(torch.Size(shape).numel() for shape in SHAPES)
    assert of_parts <= max(4 * 75 * 13, 2 * inputs)
