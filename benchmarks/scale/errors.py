"""How far a run is from its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def relative_error(measured: Sequence[float], expected: Sequence[float]) -> float:
    """The largest error of an entry, relative to the largest entry: a loss of signed terms can be
    nearly zero in a step."""
    errors = []
    for value, reference in zip(measured, expected, strict=True):
        errors.append(abs(value - reference))
    return max(errors) / max(map(abs, expected))


def update_error(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> float:
    """|change - reference change| / |reference change| over the parameters in `expected`."""
    error = change = 0.0
    for name, reference in expected.items():
        error += float((weights[name] - reference).double().square().sum())
        change += float((reference - start[name]).double().square().sum())
    return (error / change) ** 0.5
