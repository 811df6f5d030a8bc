"""Calling a user's reward function, row by row. Imports nothing heavy: Ray tasks start with this
module.

It may be a coroutine function (async def), whose rows then run side by side. A function is named
("package.module:name") or, from Python, passed as it is: also a lambda, a closure, or a
function of a notebook's cell, which Ray then sends to its tasks by value.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from hybridflow.errors import UserCodeError
from hybridflow.registry import load_object
from hybridflow.wording import kind_of
from workers.rewards.code import code
from workers.rewards.combined import CombinedReward
from workers.rewards.other_tools import reads_another_tools, rewritten
from workers.rewards.sandbox import SandboxError
from workers.rewards.sandbox.mode import Sandbox, use_sandbox
from workers.rewards.values import LARGEST, STATISTICS, as_number, shortened
from workers.time_limit import in_thread

CONSENT = "allow_unsafe"
"""The option of workers.rewards:code that only a user may set, not the data."""
RewardFunction = Callable[..., float | Mapping[str, float]]
"""f(*, prompt: str, response: str, finish_reason: str, **columns) -> reward, or {"reward": ...,
further numbers}; a cost alike. async def: awaited."""


def function_name(function: str | RewardFunction) -> str:
    """What messages and the run's written settings call it: package.module:name."""
    if isinstance(function, str):
        return function
    if inspect.isroutine(function) or inspect.isclass(function):
        return f"{function.__module__}:{function.__qualname__}"
    return f"{type(function).__module__}:{type(function).__qualname__}"


def resolve(function: str | RewardFunction, role: str = "reward") -> RewardFunction:
    """The function itself; every way in which that can fail is a ValueError with the setting's
    name."""
    found = load_object(function, f"{role}.function") if isinstance(function, str) else function
    if not callable(found):
        named = repr(function)[:60]
        raise ValueError(
            f"{role}.function={named} is {kind_of(found)}, not a function; give one, or its "
            "package.module:name"
        )
    if inspect.isclass(found):
        raise ValueError(
            f"{role}.function={function_name(function)!r} is a class; give an instance of it, "
            "which can be called, or a function"
        )
    try:
        keywords = inspect.signature(found).parameters
    except ValueError:
        raise ValueError(
            f"{role}.function={function_name(function)!r} does not say what it takes; write a "
            "function of prompt, response, finish_reason and **columns that calls it"
        ) from None
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in keywords.values()):
        missing = [name for name in ("prompt", "response", "finish_reason") if name not in keywords]
        if missing:
            raise ValueError(
                f"{role}.function={function_name(function)!r} "
                + (
                    rewritten(found, set())
                    or f"takes no {', '.join(missing)}; let it end in **columns"
                )
            )
    return found


def check_columns(function: str | RewardFunction, names: Iterable[str], role: str) -> None:
    """Whether the function can be called with a row that has the columns `names` beside prompt,
    response and finish_reason."""
    if CONSENT in names:
        raise ValueError(
            f"the data has a column {CONSENT!r}, by which it would let a reward run programs; "
            "list in data.columns the columns to keep"
        )
    given = dict.fromkeys(("prompt", "response", "finish_reason", *sorted(names)))
    if isinstance(function, CombinedReward):
        function.check_columns(given)
        return
    reward = resolve(function, role)
    if reads_another_tools(reward, given):
        message = rewritten(reward, set(given))
        raise ValueError(f"{role}.function={function_name(function)!r} {message}")
    try:
        inspect.signature(reward).bind(**given)
    except TypeError as error:
        if message := rewritten(reward, set(given)):
            raise ValueError(f"{role}.function={function_name(function)!r} {message}") from None
        raise ValueError(
            f"{role}.function={function_name(function)!r} does not fit the data ({error}): it is "
            f"called by keyword with {', '.join(given)}; let it end in **columns, give further "
            "parameters a default, or correct data.answer_column and data.columns"
        ) from None


def score_rows(
    function: str | RewardFunction,
    rows: Sequence[Mapping[str, Any]],
    role: str = "reward",
    sandbox: Sandbox = Sandbox.required,
) -> list[tuple[float, dict[str, float]]]:
    """(reward or cost, further numbers) of every row; `role` names it in a dict and in messages."""
    path, call = function_name(function), resolve(function, role)
    with use_sandbox(sandbox):
        if is_coroutine_function(call):
            results = _wait_for(_gather(path, call, rows, role))
        else:
            results = [_call(path, call, row, role) for row in rows]
    return [_checked(path, row, result, role) for row, result in zip(rows, results, strict=True)]


def runs_programs(function: RewardFunction) -> bool:
    """Whether it is workers.rewards:code, or has that among its parts."""
    parts = [function]
    if isinstance(function, CombinedReward):
        parts = [part for part, _, _ in function.parts.values()]
    return code in parts


def is_coroutine_function(function: RewardFunction) -> bool:
    """Whether its calls have to be awaited: async def, or an object whose __call__ is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _call(path: str, function: RewardFunction, row: Mapping[str, Any], role: str) -> Any:
    try:
        return function(**row)
    except SandboxError:
        raise  # the machine's, not the function's
    except (Exception, SystemExit) as error:
        # The user's code: whatever it raises, the run stops and says on which row; an exit, too,
        # which would end the run as if it were finished.
        raise _failed(path, row, role, error) from error


async def _gather(
    path: str, function: Callable[..., Any], rows: Sequence[Mapping[str, Any]], role: str
) -> list[Any]:
    async def call(row: Mapping[str, Any]) -> Any:
        try:
            return await function(**row)
        except SandboxError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(path, row, role, error) from error

    return await asyncio.gather(*(call(row) for row in rows))


def _wait_for(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Its result; in a thread of its own where this one has a loop already, as a notebook's
    does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    return in_thread(lambda: asyncio.run(coroutine))


def _failed(path: str, row: Mapping[str, Any], role: str, error: BaseException) -> UserCodeError:
    where = f"{role}.function={path!r} raised {type(error).__name__}: {error}"
    return UserCodeError(" ".join(f"{where} on {_describe(row)}".split()))


def _checked(
    path: str, row: Mapping[str, Any], result: Any, role: str
) -> tuple[float, dict[str, float]]:
    numbers = dict(result) if isinstance(result, Mapping) else {role: result}
    if role not in numbers:
        raise ValueError(
            f"{role}.function={path!r} returned a dict without {role!r} ({list(numbers)}) on "
            f"{_describe(row)}; give the number to learn from that name"
        )
    taken = sorted(STATISTICS & numbers.keys())
    if taken:
        raise ValueError(
            f"{role}.function={path!r} returned {taken[0]!r}, the name of one of the {role}'s own "
            f"statistics ({role}/{taken[0]}); give it another name"
        )
    for name, value in numbers.items():
        number = as_number(value)
        is_name = isinstance(name, str) and name.isprintable()
        if number is None or not is_name:
            shown = name if is_name else repr(name)
            raise ValueError(
                f"{role}.function={path!r} returned {shown}={shortened(value)} on "
                f"{_describe(row)}; return finite numbers, at most {LARGEST:.1e}, under names that "
                "are text"
            )
        numbers[name] = number
    return numbers.pop(role), numbers


def _describe(row: Mapping[str, Any]) -> str:
    return f"prompt {row['prompt']!r}, response {row['response'][:200]!r}"
