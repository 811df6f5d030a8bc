"""in_plain_words(): what OmegaConf says of a value that a setting can't have, as what is wrong and
what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable

Say = Callable[[re.Match[str]], str]

WORDS: tuple[tuple[str, Say], ...] = (
    (
        r"Value '(.*)' of type '.*' could not be converted to Integer",
        lambda match: f"{match[1]!r} is not a whole number; write one, such as 4",
    ),
    (
        r"Value '(.*)' of type '.*' could not be converted to Float",
        lambda match: f"{match[1]!r} is not a number; write one, such as 0.5 or 1e-6",
    ),
    (
        r"Value '(.*)' is not a valid bool \(type .*\)",
        lambda match: f"{match[1]!r} is neither true nor false; write one of the two",
    ),
    (
        r"Invalid value '(.*)', expected one of \[(.*)\]",
        lambda match: f"{match[1]!r} is none of its values; choose one of {match[2]}",
    ),
    (
        r"Cannot convert '(.*)' to string: '(.*)'",
        lambda match: f"{match[2]} is a {match[1]}, not text; write text",
    ),
    (
        r"(?:field|child) '.*' is not Optional",
        lambda _: "it can't be null; leave it out for its default",
    ),
    (
        r"Invalid value assigned: (\w+) is not a ListConfig, list or tuple\.?",
        lambda _: "it takes a list; write it in brackets, as [a, b]",
    ),
    (
        r"Invalid type assigned: \w+ is not a subclass of \w+\. value: (.*)",
        lambda match: (
            f"{match[1]!r} stands for a group of settings; set them one by one, as name.field=value"
        ),
    ),
)
"""Pattern of OmegaConf's message -> the words that replace it."""


def in_plain_words(message: str) -> str:
    """Its first line; what is not known here stays as it is.

    >>> in_plain_words("Value 'many' of type 'str' could not be converted to Integer")
    "'many' is not a whole number; write one, such as 4"
    """
    line = message.partition("\n")[0].strip()
    for pattern, say in WORDS:
        if match := re.fullmatch(pattern, line):
            return say(match)
    return line
