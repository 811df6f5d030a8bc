"""The reward of the disturbed runs; it differs between responses."""

from __future__ import annotations


def by_length(*, response: str, **columns: object) -> float:
    return float(len(response) % 5)
