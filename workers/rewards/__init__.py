"""Ready-made rewards: reward.function=workers.rewards:number

    number            the last number of the response equals the answer's: 18 = $18.00 = 18.0
    math              the final answer (boxed, or the last expression) equals the answer, by math-verify
    multiple_choice   the letter that the response chooses is the answer's
    exact_match       the response is the answer, white space and case aside
    matches           the response has the form of a regular expression
    length_penalty    0 up to a number of words, falling to -1 above it
    code              the program in the response passes its tests, in a sandbox
    combined          several of them with weights, each logged by its name (reward.parts)

Each is a plain function of a row, called by keyword as one of your own is, and may be called from
one. They import nothing heavy until they are called.
"""

from __future__ import annotations

from workers.rewards.code import code
from workers.rewards.expressions import math
from workers.rewards.numbers import number
from workers.rewards.texts import exact_match, length_penalty, matches, multiple_choice

__all__ = ["code", "exact_match", "length_penalty", "matches", "math", "multiple_choice", "number"]
