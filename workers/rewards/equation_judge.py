"""python equation_judge.py CPU_S: reads {"answer": text, "response": text} as lines of JSON, and
answers each with two lines: whether the answer can be read, then whether the two are equal. Ends
with its input.

A process of its own, because an expression such as 9^{9^{9^9}} keeps SymPy busy for ever, and only
the end of the process stops it: the answer and the response each have CPU_S seconds of processor
time, after which the system ends this process (SIGXCPU). Of the project it imports spelling.py alone.
"""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from math_verify import parse, verify

sys.path.append(str(Path(__file__).parent))  # behind the libraries: this folder has a numbers.py
from spelling import (  # type: ignore[import-not-found]
    decimal_comma,
    measure,
    plain_value,
    plainly,
    units_differ,
)

MEMORY_BYTES = 2 << 30
"""Memory on top of what the process has at its start."""
BOX = r"\boxed{"
BETWEEN = re.compile(
    r"(?!.*\n\s*\n)(?:\s|\$|\\[()\[\],;!:]|[,;&*-]|\\q?quad\b|\b(?:and|or)\b"
    r"|\\text\{[\s,]*(?:and|or)?\s*\}|\b[A-Za-z](?:_\{?\d\}?)?\s*=)*",
    re.DOTALL,
)
"""Text between boxes that are one list: \\boxed{1} and $x = \\boxed{2}$."""
PERCENTAGE = re.compile(r"\s*([-+]?[\d.,]+)\s*\\?%\s*")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
DOLLAR = re.compile(r"(?<!\\)\$")


@dataclass(frozen=True)
class Reading:
    """The values that math-verify reads in a text, with their text."""

    values: list[Any]
    is_percentage: bool = False
    """The values stand before a percent sign."""
    others: list[list[Any]] = field(default_factory=list)
    """Values by other readings: without the unit, or with a comma as the decimal point."""
    unit: str = ""
    parts: list[Reading] = field(default_factory=list)
    """Each box by itself, of a list in several boxes."""


def main() -> None:
    # Its own time limits are off, of which it warns on every call.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory()
    cpu_s = int(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        limit_cpu(cpu_s)
        expected = read_answer(request["answer"])
        are_equal(expected, read_whole("0"))  # an answer without end is found here
        print(json.dumps(bool(expected.values)), flush=True)
        if expected.values:
            limit_cpu(cpu_s)
            found = read_response(request["response"])
            print(json.dumps(are_equal(expected, found)), flush=True)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES)


def limit_cpu(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    lower(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + seconds)


def lower(name: int, value: int) -> None:
    """Sets a soft limit, which may not be over the hard one."""
    _, hard = resource.getrlimit(name)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(name, (value, hard))


def read_answer(text: str) -> Reading:
    """The reference answer, which is read as a whole: "1, 2" is a set, "5:30" a ratio, and
    "1.5e3" the number. Of a worked solution, the last box (or several, as a list) or the last
    expression counts.
    """
    text = plainly(text)
    if boxes := last_boxes(text):
        return read_whole(", ".join(boxes))
    if len(DOLLAR.findall(text)) > 1:
        return Reading(parse(text, parsing_timeout=None))
    whole = read_whole(DOLLAR.sub("", text))
    return whole if whole.values else Reading(parse(text, parsing_timeout=None))


def read_response(text: str) -> Reading:
    """The last box (or several, as a list), or else what stands between the last <answer> tags, or
    else the last expression of a response."""
    text = plainly(text)
    if boxes := last_boxes(text):
        whole = read_whole(", ".join(boxes))
        return replace(whole, parts=[read_whole(box) for box in boxes[1:] and boxes])
    if marked := ANSWER.findall(text):
        whole = read_whole(DOLLAR.sub("", marked[-1]))
        if whole.values:
            return whole
        text = marked[-1]
    return Reading(parse(text, parsing_timeout=None))


def read_whole(content: str) -> Reading:
    """The content of a box."""
    if match := PERCENTAGE.fullmatch(content):
        return Reading(parse(f"{BOX}{match[1]}}}", parsing_timeout=None), is_percentage=True)
    content = plain_value(content)
    number, unit = measure(content)
    others = [form for form in (number, decimal_comma(content)) if form]
    return Reading(
        parse(f"{BOX}{content}}}", parsing_timeout=None),
        others=[parse(f"{BOX}{form}}}", parsing_timeout=None) for form in others],
        unit=unit,
    )


def are_equal(expected: Reading, found: Reading) -> bool:
    """Whether the response has the answer; one in several boxes may also have it in each of them:
    \\boxed{1/2} or \\boxed{0.5}."""
    if found.parts and all(are_equal(expected, part) for part in found.parts):
        return True
    if not found.values or units_differ(expected.unit, found.unit):
        return False
    pairs = [(expected.values, found.values)]
    # A unit may be left out, and in some countries a comma is the decimal point.
    pairs += [(expected.values, other) for other in found.others]
    if expected.unit:
        pairs += [(expected.others[0], other) for other in (found.values, *found.others)]
    # 50% is 0.5, and 50 whose unit is left out; two percentages are compared as such.
    if expected.is_percentage and not found.is_percentage:
        pairs.append((hundredths(expected.values), found.values))
    if found.is_percentage and not expected.is_percentage:
        pairs.append((expected.values, hundredths(found.values)))
    try:
        for one, other in pairs:
            if verify(one, other, timeout_seconds=None):
                return True
    except MemoryError:
        pass
    return False


def hundredths(values: list[Any]) -> list[Any]:
    return [value / 100 for value in values if not isinstance(value, str)]


def last_boxes(text: str) -> list[str]:
    r"""The contents, each once, of the last complete \boxed{...} of a text and of those before it with
    nothing but a separator between: \boxed{1}, \boxed{2}."""
    contents: list[str] = []
    end = len(text)
    start = text.rfind(BOX)
    while start >= 0:
        place = closing_brace(text, start + len(BOX) - 1)
        if place is not None:
            if contents and not BETWEEN.fullmatch(text[place + 1 : end]):
                break
            contents.insert(0, text[start + len(BOX) : place])
            end = start
        start = text.rfind(BOX, 0, start)
    return list(dict.fromkeys(contents))


def closing_brace(text: str, opening: int) -> int | None:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    return None


if __name__ == "__main__":
    main()
