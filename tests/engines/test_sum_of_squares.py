"""The norm that all engines clip by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.engines.shared.optimizer import sum_of_squares


@pytest.mark.parametrize("size", [0, 5, 1024, 3_000_001])
def test_sum_of_squares_is_exact_for_large_buffers(size: int) -> None:
    flat = torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 0, size
    )
    expected = float(np.square(flat.numpy().astype(np.float64)).sum())
    assert float(sum_of_squares(flat)) == pytest.approx(expected, rel=1e-6)
