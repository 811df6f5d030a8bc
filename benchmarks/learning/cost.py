"""Safe-RLHF's cost in benchmarks.learning: digits that were lost or made up, whatever their
order."""

from __future__ import annotations


def wrong_digits(*, response: str, answer: str, **columns: object) -> float:
    """1 if the response is not made of the question's digits, -1 if it is."""
    return -1.0 if sorted(response.strip()) == sorted(answer) else 1.0
