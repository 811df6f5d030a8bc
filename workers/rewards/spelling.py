r"""plainly(): what people and models write in mathematics, in the LaTeX that math-verify reads: 2√2, ½,
x², 30°, 1\,234, 0.\overline{3}, 6.02 \times 10^{23}, and units apart from their numbers.

Imports nothing of the project: it is read in the judge's own process.
"""

from __future__ import annotations

import re
import string
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction

CHARACTERS = {
    "\u2212": "-",
    "\u00b0": r"^\circ",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u00f7": r"\div ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u2264": r"\leq ",
    "\u2265": r"\geq ",
    "\u2260": r"\neq ",
    "\u00b1": r"\pm ",
    "\u03c0": r"\pi ",
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
}
ONE_HALF = re.compile("(?P<whole>\\d*)\\s?(?P<part>[\u00bc-\u00be\u2150-\u215e])")
POWERS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
ROOT = re.compile("\u221a\\s*(\\((?P<inner>[^()]*)\\)|(?P<digits>\\d+(?:\\.\\d+)?|[A-Za-z]))")
SPACES = re.compile(r"(?<=\d)(?:\\[,;:!]|~|\\ )+(?=\d{3}(?!\d))")
"""LaTeX's spaces between groups of digits."""
CURRENCIES = "\u20ac\u00a3\u00a5\u20b9 \t\n"
GROUPS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
MIXED = re.compile(r"(?<![\w./^{}\\])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w/])")
REPEATING = re.compile(
    r"(?P<sign>-?)(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|bar)\{?(?P<again>\d+)\}?"
)
SCIENTIFIC = re.compile(
    r"([-+]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))"
)
PROSE = re.compile(r"\\text\{[^{}]*(?:is|are|=|:)\s*\}\s*(?=[^\s])")
"""The answer is, within a box."""
MOST_DIGITS = 400
WORDS = re.compile(r"\\(?:text|mathrm|textrm|rm)\s*\{([^{}]*)\}")
MEASURE = re.compile(
    r"(?P<number>[-+]?\s*\\?\$?\s*(?:\d[\d.,]*(?:\s*/\s*\d+)?|\d*\s*\\[dtc]?frac\s*(?:\{\d+\}\{\d+\}|\d\d)))"
    r"\s+(?P<unit>[A-Za-z]+(?:\s*/\s*[A-Za-z]+|\s+per\s+[a-z]+)?)\.?"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?\s*"
)
NO_UNITS = {
    "and",
    "or",
    "to",
    "mod",
    "pi",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "log",
    "ln",
    "exp",
    "if",
    "in",
}
LETTERS = "mgshlLNJWVAK"
"""Units of one letter."""
UNITS = {
    name: names[0]
    for names in (
        ("mm", "millimeter", "millimeters", "millimetre", "millimetres"),
        ("cm", "centimeter", "centimeters", "centimetre", "centimetres"),
        ("m", "meter", "meters", "metre", "metres"),
        ("km", "kilometer", "kilometers", "kilometre", "kilometres"),
        ("in", "inch", "inches"),
        ("ft", "foot", "feet"),
        ("mi", "mile", "miles"),
        ("g", "gram", "grams"),
        ("kg", "kilogram", "kilograms"),
        ("s", "sec", "second", "seconds"),
        ("min", "minute", "minutes"),
        ("h", "hr", "hrs", "hour", "hours"),
        ("day", "days"),
        ("dollar", "dollars"),
        ("cent", "cents"),
    )
    for name in names
}
"""Names of units -> one of them; two that are here and differ are different units."""


def plainly(text: str) -> str:
    """The same text without characters and forms that math-verify reads otherwise or not at all.

    >>> plainly("30\u00b0 + 2\u221a2")
    "30^\\\\circ + 2\\\\sqrt{2}"
    """
    text = text.replace(r"\fbox{", r"\boxed{")
    text = ONE_HALF.sub(_fraction, text)
    text = POWERS.sub(lambda match: "^{" + _digits(match[0]) + "}", text)
    text = ROOT.sub(lambda match: r"\sqrt{" + (match["inner"] or match["digits"]) + "}", text)
    for character, latex in CHARACTERS.items():
        text = text.replace(character, latex)
    return SPACES.sub("", text)


def plain_value(content: str) -> str:
    """The content of a box, or a reference answer, in a form that is one value."""
    content = PROSE.sub("", content.strip()).strip(CURRENCIES)
    if GROUPS.fullmatch(content):
        content = content.replace(" ", "")
    content = PI.sub(r"\\pi", content)
    content = MIXED.sub(r"\1\\frac{\2}{\3}", content)
    content = REPEATING.sub(_repeating, content)
    if match := SCIENTIFIC.fullmatch(content):
        content = f"{match[1]}e{match[2] or match[3]}"
    return plain_number(content) or content


def plain_number(text: str) -> str:
    """1.5e3 as 1500, because LaTeX reads e as a constant; empty for what is no such number."""
    if "e" not in text.lower():
        return ""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return ""
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int) or abs(exponent) + len(digits) > MOST_DIGITS:
        return ""
    return f"{number:f}"


def measure(content: str) -> tuple[str, str]:
    r"""(number, unit) of "10\text{ cm}"; two empty texts where it is no number with a unit."""
    match = MEASURE.fullmatch(WORDS.sub(r" \1", content).strip())
    if match is None:
        return "", ""
    unit = match["unit"]
    if unit.lower() in NO_UNITS - UNITS.keys() or (len(unit) == 1 and unit not in LETTERS):
        return "", ""
    return match["number"], unit + (match["power"] or "")


def units_differ(first: str, other: str) -> bool:
    """Whether both are units that are known, and not the same."""
    powers = [unit.lstrip(string.ascii_letters + "/ ") for unit in (first, other)]
    known = [UNITS.get(unit.rstrip("23").lower()) for unit in (first, other)]
    return None not in known and (known[0], powers[0]) != (known[1], powers[1])


def decimal_comma(content: str) -> str:
    """1,5 as 1.5; empty where the comma separates thousands or a list."""
    match = re.fullmatch(r"\s*([-+]?\d+)\s*(?:,|\{,\})(\d+)\s*", content)
    if match is None or (len(match[2]) == 3 and match[1].lstrip("+-") != "0"):
        return ""
    return f"{match[1]}.{match[2]}"


def _fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match["part"]).split("\u2044")
    return rf"{match['whole']}\frac{{{above}}}{{{below}}}"


def _digits(powers: str) -> str:
    return unicodedata.normalize("NFKC", powers).replace("\u2212", "-")


def _repeating(match: re.Match[str]) -> str:
    once, again = match["once"], match["again"]
    below = (10 ** len(again) - 1) * 10 ** len(once)
    value = Fraction(int(once or 0), 10 ** len(once)) + Fraction(int(again), below)
    value += int(match["whole"] or 0)
    return rf"{match['sign']}\frac{{{value.numerator}}}{{{value.denominator}}}"
