"""check_answers(): whether the ready-made rewards can read every reference answer, known before
anything starts.

Leaves out functions of one's own: they say so on the first row that they score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from workers.rewards.code import code, read_tests
from workers.rewards.combined import CombinedReward
from workers.rewards.expressions import math
from workers.rewards.numbers import number
from workers.rewards.texts import exact_match, multiple_choice

READERS: tuple[Callable[..., Any], ...] = (number, math, multiple_choice, exact_match, code)
"""Rewards that raise a ValueError for an answer that they can't read."""
SETUP = ("test_imports", "test_setup_code")
"""Columns that code puts before a row's assertions."""
READABLE = re.compile(r"\s*[-+]?\d+(\.\d+)?(/[1-9]\d*)?\s*")
"""Answers that math reads in any case; the others cost a millisecond each."""


def check_answers(
    function: Callable[..., Any], rows: Iterable[tuple[str, dict[str, Any]]], field: str
) -> None:
    """A ValueError that names the first row, and how many there are. `rows`: each one's place, such as
    "test.jsonl, line 3", and its columns; `field`: the setting that names them."""
    parts: list[tuple[Any, dict[str, Any]]] = [(function, {})]
    if isinstance(function, CombinedReward):
        parts = [(part, options) for part, _, options in function.parts.values()]
    parts = [(part, options) for part, options in parts if part in READERS]
    if not parts:
        return
    known: dict[str, str] = {}
    unreadable: list[tuple[str, str]] = []
    total = 0
    for place, columns in rows:
        total += 1
        problem = next(filter(None, (_problem(*part, columns, known) for part in parts)), "")
        if problem:
            unreadable.append((place, problem))
    if unreadable:
        place, problem = unreadable[0]
        raise ValueError(
            f"{field}: {place}: {problem}; correct or remove the row ({len(unreadable)} of {total} rows "
            "have such an answer)"
        )


def _problem(
    reward: Any, options: dict[str, Any], columns: dict[str, Any], known: dict[str, str]
) -> str:
    """Why the reward can't read the row's answer; empty where it can."""
    row = {**columns, **options}
    answer = row.get("answer")
    if reward is math and READABLE.fullmatch(str(answer)):
        return ""
    further = [row.get(name) for name in ("choices", "entry_point", *SETUP)]
    key = json.dumps([reward.__name__, answer, further], default=repr)
    if key not in known:
        known[key] = ""
        try:
            if reward is code:  # whose programs run later, in the sandbox
                imports, setup = (row.get(name) for name in SETUP)
                read_tests(answer, row.get("entry_point"), [*(imports or ()), setup or ""])
            else:
                reward(**{**row, "prompt": "", "response": "", "finish_reason": "stop"})
        except ValueError as error:
            known[key] = f"workers.rewards:{reward.__name__}: {error}"
    return known[key]
