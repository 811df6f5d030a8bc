"""Numbers in text, exactly: as a reader takes them, not as a regular expression of digits does."""

from __future__ import annotations

import re
from fractions import Fraction

MINUS_SIGNS = "-\u2212\u2013"
"""The hyphen, the minus sign and the en dash, which models write for it."""
FINAL = re.compile(r"####\s*(.+)")
"""Where the answers of gsm8k keep their number."""

NUMBER = re.compile(
    rf"""
    (?P<sign> (?<! [\w)\]%.] ) (?<! [\w)\]%.]\s ) [+{MINUS_SIGNS}] \s?  # a sign; after a number or a bracket
      | (?<= [\w)\]%.]\s ) [+{MINUS_SIGNS}] (?= [$\u20ac\u00a3\d.] ) )?   # it is an operator: 20-18, 20 - 18
    [$\u20ac\u00a3]? \s?                                 # a currency before the digits
    (?P<digits>
        (?<![\w.]) \d{{1,3}} (?: [,\u202f\u00a0] \d{{3}} )+ (?! \d ) (?: \. \d+ )?      # 1,234,567.8
      | (?<![\w.]) \d+ (?: \. \d+ )?                                                    # 18 and 18.0
      | (?<![\w.]) \. \d+                                                               # .5
    )
    (?: [eE] (?P<exponent> [+-]? \d{{1,3}} ) (?! \w ) )?
    (?: \s? / \s? (?P<below> \d+ ) (?! [\d.] ) )?        # a fraction
    """,
    re.VERBOSE,
)


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text, in its order: 3/4 is one number, 20-18 are two, 1,234 is one.

    >>> [str(value) for value in numbers_in("20-18, that is $1,234.50 or 3/4")]
    ['20', '18', '2469/2', '3/4']
    """
    values = []
    for match in NUMBER.finditer(text):
        value = Fraction(re.sub(r"[,\u202f\u00a0]", "", match["digits"]))
        if match["exponent"]:
            value *= Fraction(10) ** int(match["exponent"])
        if match["below"]:
            if not int(match["below"]):
                continue
            value /= int(match["below"])
        negative = match["sign"] is not None and match["sign"][0] in MINUS_SIGNS
        values.append(-value if negative else value)
    return values


def number(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    tolerance: float = 0.0,
    **columns: object,
) -> float:
    """1.0 if the last number of the response equals the answer, else 0.0.

    answer: a number, or text that ends in one ("... #### 18" in gsm8k). tolerance: how far apart
    they may be. A ValueError for an answer without a number: the row is not what this reward is
    for.
    """
    text = str(answer)
    final = FINAL.findall(text)
    expected = numbers_in(final[-1] if final else text)
    if not expected:
        raise ValueError(
            f"answer is {text[:80]!r}, which has no number; use another reward for this data"
        )
    found = numbers_in(response)
    return float(bool(found) and abs(found[-1] - expected[-1]) <= Fraction(tolerance))
