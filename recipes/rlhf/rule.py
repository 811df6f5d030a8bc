"""The rule that makes the preferences and is never shown to the policy:
gold.function=recipes.rlhf.rule:score"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

PREFIX = "Sort "


def rule(digits: str, answer: str) -> float:
    """0 to 1: the share of neighbours in ascending order, times the share of the digits that are
    there (one too many counts like one that is missing).

    >>> rule("312", "123"), rule("312", "321"), rule("312", "13")
    (1.0, 0.0, 0.6666666666666666)
    """
    if not answer.isdigit():
        return 0.0
    before, after = Counter(digits), Counter(answer)
    wrong = sum((before - after).values()) + sum((after - before).values())
    complete = max(0.0, 1 - wrong / len(digits))
    neighbours = list(pairwise(answer))
    ascending = 0.0
    if neighbours:
        ascending = sum(left < right for left, right in neighbours) / len(neighbours)
    return complete * ascending


def score(prompt: str, response: str, *, answer: str, **columns: object) -> dict[str, float]:
    """The rule's score, and whether the response is exactly right."""
    return {"reward": rule(answer, response.strip()), "exact": float(response.strip() == answer)}
