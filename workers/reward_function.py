"""Calling a user's reward function, row by row. Imports nothing heavy: Ray tasks start with this module.

A function is named ("package.module:name") or, from Python, passed as it is: also a lambda, a closure, or a
function of a notebook's cell, which Ray then sends to its tasks by value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from hybridflow.registry import load_object

RewardFunction = Callable[..., float | Mapping[str, float]]
"""f(*, prompt: str, response: str, finish_reason: str, **columns) -> reward, or {"reward": ..., further
numbers}; a cost alike."""


def function_name(function: str | RewardFunction) -> str:
    """What messages and the run's written settings call it: package.module:name."""
    if isinstance(function, str):
        return function
    if inspect.isroutine(function) or inspect.isclass(function):
        return f"{function.__module__}:{function.__qualname__}"
    return f"{type(function).__module__}:{type(function).__qualname__}"


def resolve(function: str | RewardFunction, role: str = "reward") -> RewardFunction:
    """The function itself; every way in which that can fail is a ValueError with the setting's name."""
    found = load_object(function, f"{role}.function") if isinstance(function, str) else function
    if not callable(found):
        raise ValueError(
            f"{role}.function={function_name(function)!r} is a {type(found).__name__}, not a function"
        )
    keywords = inspect.signature(found).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in keywords.values()):
        missing = [name for name in ("prompt", "response", "finish_reason") if name not in keywords]
        if missing:
            raise ValueError(
                f"{role}.function={function_name(function)!r} takes no {', '.join(missing)}; let it end in "
                "**columns"
            )
    return found


def check_columns(function: str | RewardFunction, names: Iterable[str], role: str) -> None:
    """Whether the function can be called with a row that has the columns `names` beside prompt, response and
    finish_reason."""
    given = dict.fromkeys(("prompt", "response", "finish_reason", *sorted(names)))
    try:
        inspect.signature(resolve(function, role)).bind(**given)
    except TypeError as error:
        raise ValueError(
            f"{role}.function={function_name(function)!r} does not fit the data ({error}): it is called by "
            f"keyword with {', '.join(given)}; let it end in "
            "**columns, give further parameters a default, or correct data.answer_column and data.columns"
        ) from None


def score_rows(
    function: str | RewardFunction, rows: Sequence[Mapping[str, Any]], role: str = "reward"
) -> list[tuple[float, dict[str, float]]]:
    """(reward or cost, further numbers) of every row; `role` names it in a dict and in messages."""
    path, call = function_name(function), resolve(function, role)
    return [_checked(path, row, _call(path, call, row, role), role) for row in rows]


def _call(path: str, function: RewardFunction, row: Mapping[str, Any], role: str) -> Any:
    try:
        return function(**row)
    except Exception as error:
        # The user's code: whatever it raises, the run stops and says on which row.
        raise RuntimeError(
            f"{role}.function={path!r} raised {type(error).__name__}: {error} on {_describe(row)}"
        ) from error


def _checked(path: str, row: Mapping[str, Any], result: Any, role: str) -> tuple[float, dict[str, float]]:
    numbers = dict(result) if isinstance(result, Mapping) else {role: result}
    if role not in numbers:
        raise ValueError(
            f"{role}.function={path!r} returned a dict without {role!r} ({sorted(numbers)}) on "
            f"{_describe(row)}"
        )
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"{role}.function={path!r} returned {name}={value!r} on {_describe(row)}; return finite "
                "numbers"
            )
    score = float(numbers.pop(role))
    return score, {name: float(value) for name, value in numbers.items()}


def _describe(row: Mapping[str, Any]) -> str:
    return f"prompt {row['prompt']!r}, response {row['response'][:200]!r}"
