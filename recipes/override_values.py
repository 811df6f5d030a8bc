"""quote_values(): name=value arguments as a user writes them, in the grammar of Hydra's command
line.

Hydra's lexer knows few characters outside quotes, and takes text for numbers, functions or choices.
Here a value of a text setting is text, whatever characters it has; in double quotes \\n, \\t and
\\uXXXX are what they are in Python, YAML and JSON; in single quotes everything is itself. Values of
other settings are left as they are where Hydra can read them.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from controllers import usable_algorithms
from recipes.config import RunConfig

HYDRAS = "hydra"
"""Settings of Hydra itself, whose values it reads itself."""
ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "/": "/", "0": "\0"}


def quote_values(arguments: Sequence[str]) -> list[str]:
    """The same arguments, in Hydra's grammar.

    >>> quote_values(["model.path=~/a(b)", "actor.generation.sampling.stop_strings=[</s>]"])
    ["model.path='~/a(b)'", "actor.generation.sampling.stop_strings=['</s>']"]
    """
    hints = setting_types()
    quoted = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        plain_name = name.lstrip("+")
        if equals and not name.startswith(("~", "-")) and plain_name.split(".")[0] != HYDRAS:
            value = in_hydras_grammar(value, hints.get(plain_name, object))
        quoted.append(f"{name}{equals}{value}")
    return quoted


def in_hydras_grammar(value: str, hint: object) -> str:
    """The value of a setting of that type."""
    text = value.strip()
    if is_text(hint) and not is_quoted(text):
        return text if text == "null" else quoted(value)
    if is_quoted(text):
        return quoted(unquoted(text)) if text[0] == '"' else text
    if is_enclosed(text, "[]"):
        element = element_type(hint)
        items = [in_hydras_grammar(item, element) for item in split(text[1:-1])]
        return f"[{', '.join(items)}]"
    if is_enclosed(text, "{}"):
        items = []
        for item in split(text[1:-1]):
            key, colon, inner = item.partition(":")
            items.append(f"{key.strip()}{colon} {in_hydras_grammar(inner, object)}".strip())
        return f"{{{', '.join(items)}}}"
    if hint is Any:
        return text if text == "null" else quoted(value)
    # Brackets that do not close are a slip, not text; Hydra says so.
    return text if is_readable(text) or text[:1] in tuple("[{") else quoted(text)


def is_text(hint: object) -> bool:
    """Whether the setting is a text: str, or str | None."""
    if isinstance(hint, types.UnionType):
        return set(typing.get_args(hint)) == {str, type(None)}
    return hint is str


def element_type(hint: object) -> object:
    """The type of a list's elements; texts in a list of any type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list and arguments:
        return arguments[0]
    return Any if hint is Any else object


def is_quoted(text: str) -> bool:
    """Whether all of it is in one pair of quotes."""
    return text[:1] in ("'", '"') and text != "" and closing_quote(text, 0) == len(text) - 1


def closing_quote(text: str, start: int) -> int:
    """Where the quote that opens at `start` closes; -1 where it does not."""
    place = start + 1
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == text[start]:
            return place
        place += 1
    return -1


def unquoted(text: str) -> str:
    """The text between double quotes; a backslash before another character stays (\\d)."""

    def character(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "ux" and len(code) > 1:
            return chr(int(code[1:], 16))
        return ESCAPED.get(code, match[0])

    return ESCAPE.sub(character, text[1:-1])


def quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def is_enclosed(text: str, brackets: str) -> bool:
    return len(text) > 1 and text[0] == brackets[0] and text[-1] == brackets[1]


def split(text: str) -> list[str]:
    """What stands between the commas that are in no quotes and brackets.

    >>> split("a, [b, c], 'd, e'")
    ['a', '[b, c]', "'d, e'"]
    """
    items, start, depth, begins, place = [], 0, 0, True, 0
    while place < len(text):
        character = text[place]
        if begins and character in "'\"" and closing_quote(text, place) > 0:
            place = closing_quote(text, place)
            begins = False
        elif character in "[{" and (begins or depth):
            depth += 1
        elif character in "]}" and depth:
            depth -= 1
            begins = False
        elif character == "," and not depth:
            items.append(text[start:place])
            start, begins = place + 1, True
        elif character in ",:" or character.isspace():
            begins = begins or character != " "
        else:
            begins = False
        place += 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]


@cache
def is_readable(text: str) -> bool:
    """Whether Hydra reads it as one value."""
    try:
        override = OverridesParser.create().parse_override(f"x={text}")
    except HydraException:
        return False
    return not override.is_sweep_override()


@cache
def setting_types() -> dict[str, object]:
    """Every setting's full name -> its type, of all algorithms."""
    hints = dict(types_of(RunConfig, ""))
    for entry in usable_algorithms().values():
        hints |= dict(types_of(entry.load_config(), "algorithm."))
    return hints


def types_of(schema: type, prefix: str) -> Iterator[tuple[str, object]]:
    for name, hint in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}", hint
        for kind in (hint, *typing.get_args(hint)):
            if (
                isinstance(kind, type)
                and is_dataclass(kind)
                and typing.get_origin(hint) is not dict
            ):
                yield from types_of(kind, f"{prefix}{name}.")
