"""Grouped key-value heads in PyTorch's fused attention, by device and precision."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from workers.engines.model.attention import takes_groups


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, False),
        ("cuda", torch.bfloat16, True),
        ("cpu", torch.float32, True),
    ],
)
def test_float32_on_gpus_repeats_heads(device: str, dtype: torch.dtype, expected: bool) -> None:
    """G17: only the half-precision kernel of CUDA knows groups; float32 would take the kernel that
    holds scores of tokens x tokens."""
    with FakeTensorMode():
        key = torch.empty(1, 2, 8, 16, device=device, dtype=dtype)
        assert takes_groups(None, key, key) is expected
