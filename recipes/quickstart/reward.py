"""The quickstart's reward: reward.function=recipes.quickstart.reward:exact_match"""

from __future__ import annotations


def exact_match(prompt: str, response: str, *, answer: str, **columns: object) -> float:
    """1.0 if the response is the answer, spaces around it aside; 0.0 otherwise."""
    return float(response.strip() == answer)
