"""Numbers in text, exactly: as a reader takes them, not as a regular expression of digits does."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

MINUS_SIGNS = "-\u2212\u2013"
"""The hyphen, the minus sign and the en dash, which models write for it."""
FINAL = re.compile(r"####\s*(.+)")
"""Where the answers of gsm8k keep their number."""

SIGNS = r"+\-\u2212\u2013"
CURRENCY = "$\u00a3\u00a5\u20a0-\u20bf"
GROUP = r"[,_'\u2019\u202f\u2009\u00a0]"
"""Separators of groups of digits; a plain space is another, in fewer places."""
GAP = r"['\u2019\u202f\u2009\u00a0 ]"
"""Those behind which a comma is the decimal point."""

NUMBER = re.compile(
    rf"""
    (?P<sign> (?<! [\w)\]%.] ) (?<! [\w)\]%.]\s ) [{SIGNS}] \s?  # a sign; after a number or a bracket
      | (?<= [\w)\]%.]\s ) [{SIGNS}] (?= \\? [{CURRENCY}\d.] ) )?   # it is an operator: 20-18, 20 - 18
    (?: \\? [{CURRENCY}] )? \s?                          # a currency before the digits
    (?: (?<![\w.]) (?P<whole> \d+ ) [ ] (?= \d+ [ ]? / ) )?                               # 2 of 2 1/2
    (?P<digits>
        (?<![\w.,]) (?<! \d[ ] ) (?P<comma> (?:
            \d{{1,3}} (?: \. \d{{3}} )+ , \d+                                        # 1.234,56
          | \d{{1,3}} (?: {GAP} \d{{3}} )+ , (?! \d{{3}} (?! \d ) ) \d+              # 1 234,56
          | (?: 0 | \d{{4,}} ) , \d+                                            # 0,125
          | \d{{1,3}} , (?! \d{{3}} (?! \d ) ) \d+                              # 1,5 but 1,234
          ) (?! [.,]? \d ) )
      | (?<![\w.,]) [1-9]\d{{0,2}} (?: \. \d{{3}} ){{2,}} (?! [.,]? \d )              # 1.234.567
      | (?<![\w.]) (?<! \d[ ] ) [1-9]\d{{0,2}} (?: [ ] \d{{3}} )+ (?! [ ,]? \d ) (?: \. \d+ )?   # 1 234
      | (?<![\w.]) \d{{1,3}} (?: {GROUP} \d{{3}} )+ (?! \d ) (?: \. \d+ )?              # 1,234,567.8
      | (?<![\w.]) \d{{1,2}} (?: , \d{{2}} )+ , \d{{3}} (?! \d ) (?: \. \d+ )?            # 12,34,567
      | (?<![\w.]) \d+ (?: \. \d+ )?                                                    # 18 and 18.0
      | (?<![\w.]) \. \d+                                                               # .5
    )
    (?: [eE] (?P<exponent> [+-]? \d{{1,3}} ) (?! \w )
      | \s? (?: [x\u00d7*\u00b7] | \\times | \\cdot ) \s? 10 \s? (?: \^ | \*\* ) \s?            # 1.5 x 10^3
        (?: (?P<power> [{SIGNS}]? \d{{1,3}} ) | \{{ \s? (?P<braced> [{SIGNS}]? \d{{1,3}} ) \s? \}} )
      | \s? \^ \s? (?: (?P<raised> [{SIGNS}]? \d{{1,3}} (?! \.? \d ) )            # 10^2
        | \{{ \s? (?P<raised_braced> [{SIGNS}]? \d{{1,3}} ) \s? \}} )
    )?
    (?: [ ]? / [ ]? (?P<below> \d{{1,3}} (?: , \d{{3}} )+ | \d+ ) (?! \.? \d ) )?              # a fraction
    """,
    re.VERBOSE,
)
FRACTION = re.compile(rf"\\[dtc]?frac\s*\{{\s*([{SIGNS}]?\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}")
SPACES = re.compile(r"(?<=\d)(?:(?P<braces>\{,\})|(?P<comma>,?)\\(?P<space>[,!;:]))(?=\d)")
"""LaTeX's separators of groups of digits: 1{,}234, 1\\,234."""
SHORT_FRACTION = re.compile(r"\\([dtc]?frac)\s*(\d)\s*(\d)")
ONE_HALF = re.compile("[\u00bc-\u00be\u2150-\u215e]")
SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
OF_A_UNIT = re.compile(rf"(?<=[A-Za-z}}])\s?\^\s?(?:\{{[^{{}}]*\}}|[{SIGNS}]?\d+)")
"""The exponent of a unit or a variable, which is no number of its own: cm^2, m/s^{2}."""
LONGEST_BASE = 20
"""Digits of the largest number that is raised to a power: 999 times as many are still quick."""


LISTED = re.compile(
    r"(?<![\w.,])(?:\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])|[1-9]\d{0,2}(?: \d{3})+(?! ?\d))"
)
"""A number in groups as India writes it or with spaces, or a list of numbers: 10,20,300 and 1 234."""
PAIR = re.compile(rf"(?:[(\[]|(?<!\w)\{{)\s*[{SIGNS}]?\d+,\d+\s*(?:[)\]]|\\?\}})")
"""Two numbers in brackets, (1,5) and \\{1,5\\}, where the comma is no decimal point."""


def _apart(match: re.Match[str]) -> str:
    return re.sub("[, ]", ", ", match[0])


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text, in its order: 3/4 and 2 1/2 are one number, 20-18 are two; 1,234
    and 1.234,5 have thousands, 1,5 has decimals.

    >>> [str(value) for value in numbers_in("20-18, that is $1,234.50 or 3/4")]
    ['20', '18', '2469/2', '3/4']
    """
    text = plainly_written(text)
    values = []
    for match in NUMBER.finditer(text):
        digits = _digits(match["digits"], has_comma=match["comma"] is not None)
        value = Fraction(Decimal(digits))  # int() refuses texts of over 4,300 digits
        if power := match["exponent"] or match["power"] or match["braced"]:
            value *= Fraction(10) ** _exponent(power)
        if power := match["raised"] or match["raised_braced"]:
            exponent = _exponent(power)
            if len(digits) > LONGEST_BASE or (not value and exponent < 0):
                continue
            value **= exponent
        if match["below"]:
            below = int(Decimal(match["below"].replace(",", "")))
            if not below:
                continue
            value /= below
        if match["whole"]:
            if value < 1:
                value += Fraction(Decimal(match["whole"]))
            else:
                values.append(_signed(text, match, Fraction(Decimal(match["whole"]))))
                values.append(value)
                continue
        values.append(_signed(text, match, value))
    return values


def plainly_written(text: str) -> str:
    r"""\frac{3}{4} as 3/4, 1{,}234 as 1,234, the character of one half as 1/2, 10² as 10^{2}, and
    cm^2 as cm."""

    def spelled(match: re.Match[str]) -> str:
        return " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")

    text = SPACES.sub(_latex_gap, text)
    text = PAIR.sub(_pair_apart, text)
    text = ONE_HALF.sub(spelled, text)
    text = SUPERSCRIPTS.sub(_braced, text)
    text = OF_A_UNIT.sub("", text)
    text = SHORT_FRACTION.sub(r"\\\1{\2}{\3}", text)
    after_a_digit = re.sub(rf"(?<=\d)(?={FRACTION.pattern})", " ", text)
    return FRACTION.sub(r"\1/\2", after_a_digit)


def _pair_apart(match: re.Match[str]) -> str:
    if re.search(r",\d{3}\D", match[0]):
        return match[0]
    return match[0].replace(",", ", ")


def _digits(text: str, *, has_comma: bool) -> str:
    """The digits of a number, with a point before its decimals and nothing between its groups."""
    if has_comma:
        return re.sub(r"[^\d,]", "", text).replace(",", ".")
    if text.count(".") > 1:
        return text.replace(".", "")
    return re.sub(f"{GROUP}| ", "", text)


def _latex_gap(match: re.Match[str]) -> str:
    r"""1{,}234 and 1,\!234 as 1,234, 1\,234 with a thin space; 1{,}5 as 1,5, but 1,\;5 as 1, 5."""
    if match["braces"]:
        return ","
    if re.match(r"\d{3}(?!\d)", match.string[match.end() :]):
        return match["comma"] or "\u2009"
    return match["comma"] + " "


def _braced(match: re.Match[str]) -> str:
    return "^{" + unicodedata.normalize("NFKC", match[0]) + "}"


def _exponent(text: str) -> int:
    return int(text.lstrip(f"+{MINUS_SIGNS}")) * (-1) ** (text[0] in MINUS_SIGNS)


def _signed(text: str, match: re.Match[str], value: Fraction) -> Fraction:
    sign = match["sign"] or ""
    if not sign or sign[0] not in MINUS_SIGNS:
        return value
    if len(sign) > 1 and not text[: match.start()].rpartition("\n")[2].strip():
        return value  # the item of a list
    return -value


def number(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    tolerance: float = 0.0,
    **columns: object,
) -> float:
    """1.0 if the last number of the response equals the answer, else 0.0. 10,20,300 may be read as
    three numbers, and as one in groups as India writes it; 1 234 as two, and as one.

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
    most = Fraction(str(tolerance))
    for found in (numbers_in(response), numbers_in(LISTED.sub(_apart, response))):
        if found and abs(found[-1] - expected[-1]) <= most:
            return 1.0
    return 0.0
