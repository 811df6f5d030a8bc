"""Mathematical answers: fractions, roots, units, intervals, sets and equations, compared by
math-verify."""

from __future__ import annotations

import logging


def math(
    prompt: str, response: str, *, finish_reason: str, answer: object, **columns: object
) -> float:
    r"""1.0 if the response's final answer equals the answer, else 0.0: \boxed{\frac{1}{2}} = 0.5 =
    1/2.

    The final answer is what stands in the last \boxed{...}, or the last expression in dollars or
    plain text. A ValueError for an answer that math-verify can't read.
    """
    from math_verify import parse, verify

    # Its own time limits need the main thread of a process; reward.timeout_s is over all of a
    # task's rows. It warns on every call that they are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = str(answer)
    expected = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
    if not expected:
        raise ValueError(
            f"answer is {text[:80]!r}, which math-verify can't read; use another reward"
        )
    found = parse(last_boxed(response) or response, parsing_timeout=None)
    return float(bool(found) and bool(verify(expected, found, timeout_seconds=None)))


def last_boxed(text: str) -> str:
    r"""The last \boxed{...} of a text, with its braces; empty without a complete one."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for place in range(start + len(r"\boxed"), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start : place + 1]
        start = text.rfind(r"\boxed{", 0, start)
    return ""
