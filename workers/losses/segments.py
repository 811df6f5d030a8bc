"""Sums and means over the rows of a flat ragged tensor.

Rows are given by `row`, int64 [tokens], the row of every token; a row without tokens has sum 0 and
mean 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_of_token(lengths: Tensor) -> Tensor:
    """int64 [sum(lengths)]: the row of every token, from int64 [rows]; on the device of
    `lengths`."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[num_rows] sums of [tokens]; differentiable."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def segment_count(row: Tensor, num_rows: int) -> Tensor:
    """int64 [num_rows]: tokens of each row."""
    # Not bincount: its length depends on the values, so that the host would wait for the device.
    return row.new_zeros(num_rows).index_add_(0, row, torch.ones_like(row))


def segment_mean(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[num_rows] means of [tokens]; differentiable."""
    return segment_sum(values, row, num_rows) / segment_count(row, num_rows).clamp(min=1)
