"""Reward functions written for verl, TRL or OpenRLHF: the function of ours that calls them.

They are not called as they are: one gets lists, another the answer under a name of its own, and what
they return differs. A message shows what to write instead.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

OF_ONE = {
    "data_source": 'columns["data_source"]',
    "solution_str": "response",
    "ground_truth": 'columns["answer"]',
    "extra_info": 'columns.get("extra_info")',
}
"""verl's parameters, one response a call: what they are here."""
OF_LISTS = {
    "data_sources": '[columns["data_source"]]',
    "solution_strs": "[response]",
    "ground_truths": '[columns["answer"]]',
    "extra_infos": '[columns.get("extra_info")]',
    "queries": "[prompt + response]",
    "prompts": "[prompt]",
    "completions": "[response]",
    "labels": '[columns["answer"]]',
}
"""Those of verl's batches, of TRL and of OpenRLHF, whose functions get and return lists."""
OWNERS = {
    "solution_str": "verl",
    "solution_strs": "verl",
    "completions": "TRL",
    "queries": "OpenRLHF",
}
"""Parameters that only these have."""


def rewritten(function: Callable[..., Any], columns: set[str]) -> str | None:
    """The end of a message about a function with another tool's parameters: what to write; None for
    any other. `columns`: those of the data, whose names are nobody else's."""
    parameters = dict(inspect.signature(function).parameters)
    for key in keys_read(function):
        if key in OF_ONE or key in OF_LISTS:
            parameters[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY)
    owners = [OWNERS[name] for name in parameters if name in OWNERS and name not in columns]
    if not owners:
        return None
    name = str(getattr(function, "__name__", ""))
    if not name.isidentifier():  # a lambda, or an object that can be called
        name = "the_function"
    listed = any(parameter in OF_LISTS for parameter in parameters)
    arguments = [
        f"{each}={_argument(each, listed)}"
        for each, parameter in parameters.items()
        if _is_given(parameter)
    ]
    if owners[0] == "TRL" and any(map(_takes_the_rest, parameters.values())):
        arguments = [each for each in arguments if each.partition("=")[0] in OF_LISTS]
        arguments.append("**{name: [value] for name, value in columns.items()}")
    call = f"{name}({', '.join(arguments)}){'[0]' if listed else ''}"
    return (
        f"has {owners[0]}'s parameters; give a function that calls it: def reward(*, prompt, response, "
        f"**columns): return {call}"
    )


def reads_another_tools(function: Callable[..., Any], columns: Container[str]) -> bool:
    """Whether it takes another tool's parameter out of its keyword arguments, which have none of
    that name: it can be called, and fails at the first row."""
    return any(key in OWNERS and key not in columns for key in keys_read(function))


def keys_read(function: Callable[..., Any]) -> list[str]:
    """The keys that its code takes from its keyword arguments and does not ask for first:
    ["completions"] of def f(**arguments): arguments["completions"]."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    rest = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if _takes_the_rest(parameter)
    ]
    if code is None or not rest:
        return []
    read, tested = [], set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "RESUME")]
    for first, second, third in zip(steps, steps[1:], steps[2:], strict=False):
        if third.opname.startswith("BINARY") and first.argval == rest[0]:
            read.append(second.argval)
        if third.opname == "CONTAINS_OP" and second.argval == rest[0]:
            tested.add(first.argval)
    return [key for key in read if isinstance(key, str) and key not in tested]


def _argument(name: str, listed: bool) -> str:
    arguments: Mapping[str, str] = OF_LISTS if listed else OF_ONE
    column = f'columns["{name}"]'
    return arguments.get(name, f"[{column}]" if listed else column)


def _takes_the_rest(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.VAR_KEYWORD


def _is_given(parameter: inspect.Parameter) -> bool:
    """Whether the call names it: one that is known, or that has no default."""
    if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
        return False
    required = parameter.default is inspect.Parameter.empty
    return required or parameter.name in OF_ONE or parameter.name in OF_LISTS
