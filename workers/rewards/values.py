"""Whether what a reward function returned is a number that a reward can be."""

from __future__ import annotations

import sys
from decimal import Decimal
from numbers import Real

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
"""Rewards travel as float32."""
STATISTICS = frozenset({"mean", "std", "max", "min", "unreadable"})
"""Names under which the reward's own statistics are logged."""


def as_number(value: object) -> float | None:
    """A finite number that float32 can hold, as a float; None for anything else.

    Python's and numpy's numbers and truth values, fractions and decimals, arrays and tensors
    without dimensions.
    """
    torch = sys.modules.get("torch")  # a tensor exists only where it was imported
    if (isinstance(value, np.ndarray) and value.ndim == 0) or (
        torch is not None and isinstance(value, torch.Tensor) and value.dim() == 0
    ):
        value = value.item()
    if isinstance(value, np.bool_ | np.floating | np.integer):
        value = value.item()  # a comparison would be in the number's own precision
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    # Python compares integers, fractions and decimals of any size with a float exactly.
    if isinstance(value, Real | Decimal) and abs(value) <= LARGEST:  # type: ignore[operator]
        return float(value)
    return None


def shortened(value: object) -> str:
    """Its text for a message."""
    if isinstance(value, int) and abs(value) > 10**80:  # Python refuses to write out a long one
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:40]}... ({len(text)} characters)"
