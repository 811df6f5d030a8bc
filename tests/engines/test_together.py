"""A micro-batch's tensors in one copy (workers/engines/shared/together.py), and what travels with it."""

from __future__ import annotations

import pytest
import torch

from tests.engines.switch_workers import grouped_rows
from workers.engines.base import Head
from workers.engines.shared.micro_batches import Cutting, make_micro_batches
from workers.engines.shared.together import together
from workers.losses.reduction import Counted

CPU = torch.device("cpu")


def test_tensors_arrive_as_they_were() -> None:
    """Types of all widths, no elements, no dimensions, and rows that do not lie together."""
    sent = [
        torch.arange(7),
        torch.tensor([True, False, True]),
        torch.rand(3, 5).t(),
        torch.zeros(0, dtype=torch.int16),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(3, dtype=torch.int16),
    ]
    arrived = together(sent, CPU, page_locked=False)
    for tensor, copy in zip(sent, arrived, strict=True):
        assert copy.dtype is tensor.dtype and torch.equal(copy, tensor)


def test_writing_to_one_is_not_writing_to_another() -> None:
    """Autograd would refuse the backward pass of what it saved."""
    factor, other = together([torch.tensor([2.0]), torch.tensor([3.0])], CPU, page_locked=False)
    leaf = torch.ones(1, requires_grad=True)
    result = leaf * factor
    other.add_(1.0)
    result.backward()
    assert leaf.grad is not None and float(leaf.grad) == 2.0


@pytest.mark.parametrize("episodes", [False, True])
def test_what_a_loss_reads_is_the_same_on_a_gpu(episodes: bool) -> None:
    """Which tokens count and whose they are is found before the rows leave the host."""
    rows = grouped_rows(0)
    weights = rows.per_token["weights"].clone()
    weights[::3] = 0.0
    rows = rows.with_columns(per_token={"weights": weights})
    if episodes:
        rows.batch_row = torch.arange(rows.num_rows) // 2
    (micro_batch, *_) = make_micro_batches(
        rows, Head.lm, Cutting(budget_tokens=60, packing=True, share_prompts=True)
    )
    here = micro_batch.sequences
    there = here.moved(torch.clone)
    assert there.counted is not None and there.token_rows is not None
    for ours, theirs in zip(vars_of(Counted.of(here)), vars_of(Counted.of(there)), strict=True):
        assert torch.equal(ours, theirs)
    assert (there.batch_row is None) is not episodes


def vars_of(counted: Counted) -> list[torch.Tensor]:
    return [counted.index, counted.weights, counted.mean_weights, counted.row]
