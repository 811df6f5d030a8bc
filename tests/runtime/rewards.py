"""Reward functions for the tests."""

from __future__ import annotations

import time
from pathlib import Path


def count(*, response: str, **columns: object) -> float:
    """Share of even numbers in the response."""
    numbers = [int(word) for word in response.split() if word.isdigit()]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


def gated(*, response: str, gate: str, **columns: object) -> float:
    """Waits until the file that the prompt's row names exists, so that somebody can look at the
    run; a row without one waits for nothing."""
    deadline = time.monotonic() + 300
    while gate and not Path(gate).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.1)
    return count(response=response)


def broken(*, response: str, **columns: object) -> float:
    raise KeyError("answer")


def slow(*, response: str, **columns: object) -> float:
    time.sleep(30)
    return 0.0


def not_a_number(*, response: str, **columns: object) -> float:
    return float("nan")


def two_numbers(*, response: str, **columns: object) -> dict[str, float]:
    return {"reward": 1.0, "words": float(len(response.split()))}
