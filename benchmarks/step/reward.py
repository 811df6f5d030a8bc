"""The reward function of benchmarks.step, in the form that recipes take."""

from __future__ import annotations

from benchmarks.step.case import reward


def score(*, response: str, **_columns: object) -> float:
    return reward(response)
