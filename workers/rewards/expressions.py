"""Mathematical answers: fractions, roots, units, intervals, sets and equations, compared by math-verify."""

from __future__ import annotations


def math(prompt: str, response: str, *, finish_reason: str, answer: object, **columns: object) -> float:
    r"""1.0 if the response's final answer equals the answer, else 0.0: \boxed{\frac{1}{2}} = 0.5 = 1/2.

    The final answer is what stands in the last \boxed{...}, or the last expression in dollars or plain text. A
    ValueError for an answer that math-verify can't read.
    """
    from math_verify import parse, verify

    # Its own time limits need the main thread of a process; a reward task has one for all its rows.
    text = str(answer)
    expected = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
    if not expected:
        raise ValueError(f"answer is {text[:80]!r}, which math-verify can't read; use another reward")
    found = parse(response, parsing_timeout=None)
    return float(bool(found) and bool(verify(expected, found, timeout_seconds=None)))
