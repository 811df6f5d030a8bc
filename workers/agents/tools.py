'''Tools: an object whose typed public methods are what the policy may call, as an episode.

    class Calculator:
        def add(self, a: int, b: int) -> int:
            """Adds two numbers.

            Args:
                a: The first number.
                b: The second number.
            """
            return a + b

    python -m recipes.grpo environment=my_module:Calculator reward.function=my_module:is_right ...

Further methods that the class may have, none of which is a tool: reset(task), whose result, where
it has one, stands in the place of the data's prompt; reward(answer), the reward of the policy's
last words; close(). A fresh object is made for every episode. Methods may be async; the others of
one object run in one thread.
'''

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_type_hints, runtime_checkable

import numpy as np
import torch
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
)

from workers.agents.arguments import fitted, has_classes, schema_of
from workers.agents.environment import closing, messages_of
from workers.agents.model import Model
from workers.agents.outcome import EnvironmentMistake, LimitReached, Outcome, shortened
from workers.agents.renderer import Message
from workers.agents.threads import Caller
from workers.agents.tool_calls import ToolCall, read_calls

NO_TOOLS = ("reset", "reward", "close")
TOLD = (ValueError, TypeError, ArithmeticError, LookupError)
"""Errors of a tool that are the policy's mistakes, and told to it; any other fails the episode."""
UNNAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)
"""Kinds of parameters that a call by name can't give."""
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>$")
"""The end of what Python says of a function, a generator or any other thing without a text."""


@runtime_checkable
class Resets(Protocol):
    """Tools that begin with the row of data."""

    def reset(self, task: dict[str, Any]) -> Any:
        """Text, a message or messages in the place of the data's prompt; None leaves it."""


@runtime_checkable
class Rewards(Protocol):
    """Tools that know what an episode is worth."""

    def reward(self, answer: str) -> Any:
        """A number or an Outcome; `answer` is the policy's last reply without calls, empty where a
        limit came before one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolbox:
    """The tools of one episode, wherever they come from."""

    call: Callable[[str, dict[str, Any]], Awaitable[Any]]
    """name, arguments -> the result; raises one of TOLD for a mistake of the policy's."""
    owner: Any
    """The object with the further methods."""
    calls: Caller = field(default_factory=Caller)
    """How those are called."""


def tool_names(kind: type) -> list[str]:
    """The public methods of a class that are tools, in the order of their definition."""
    names: dict[str, None] = {}
    for base in reversed(kind.__mro__[:-1]):
        for name, member in vars(base).items():
            # Functions, and what functools.cache makes of them.
            is_method = inspect.isroutine(member) and (
                callable(member) or isinstance(member, staticmethod | classmethod)
            )
            if is_method and not name.startswith("_") and name not in NO_TOOLS:
                names[name] = None
            elif not is_method:
                names.pop(name, None)  # add = None takes a base's tool away
    return list(names)


def schemas_of(kind: type) -> list[Message]:
    """The JSON schema of every tool of a class, for the chat template."""
    schemas = []
    for name in tool_names(kind):
        method = vars_of(kind)[name].__get__(object(), kind)
        try:
            schemas.append(_schema(method))
        except (DocstringParsingException, TypeHintParsingException, NameError, TypeError) as error:
            raise _indescribable(kind, name, str(error)) from error
    return schemas


def _schema(method: Callable[..., Any]) -> Message:
    """A method's schema as transformers writes it; that of parameters whose types it takes for any
    object, or for none, is schema_of's."""
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        raise TypeError("it yields; return the result, a list say")
    hints, parameters = get_type_hints(method), inspect.signature(method).parameters
    for parameter in parameters.values():
        if parameter.kind in UNNAMED:
            raise TypeError(f"the policy names its arguments, and can't name those of {parameter}")
    try:
        schema = get_json_schema(method)
        names = [name for name in parameters if has_classes(hints[name])]
    except TypeHintParsingException:
        schema, names = get_json_schema(_of_any_types(method)), list(parameters)
    properties = schema["function"]["parameters"]["properties"]
    for name in parameters:
        described = schema_of(hints[name])
        if name in names:
            properties[name] = described | {"description": properties[name]["description"]}
    return schema


def _of_any_types(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the method's name, docstring and parameters, which may be anything."""

    def stand_in() -> None: ...

    signature = inspect.signature(method)
    vars(stand_in)["__signature__"] = signature
    stand_in.__name__, stand_in.__doc__ = method.__name__, method.__doc__
    stand_in.__annotations__ = dict.fromkeys(signature.parameters, Any)
    return stand_in


def _indescribable(kind: type, name: str, reason: str) -> ValueError:
    return ValueError(
        f"environment={kind.__module__}:{kind.__qualname__}: its method {name} can't be "
        f"described to the policy ({' '.join(reason.split())}); give it type hints and a "
        "docstring with Args, or a name that begins with _"
    )


def vars_of(kind: type) -> dict[str, Any]:
    """Name -> member of a class and its bases."""
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        members |= vars(base)
    return members


def toolbox(instance: Any, calls: Caller | None = None) -> Toolbox:
    """The tools of an object. `calls`: the one that made it, if one did."""
    kind, calls = type(instance), calls or Caller()
    members, names = vars_of(kind), tool_names(kind)

    async def call_tool(name: str, arguments: dict[str, Any]) -> Any:
        if name not in names:
            raise LookupError(f"there is no tool {name!r}; there are {', '.join(names)}")
        bound = members[name].__get__(instance, kind)
        inspect.signature(bound).bind(**arguments)
        hints = get_type_hints(bound)
        given = {}
        for parameter, value in arguments.items():
            given[parameter] = fitted(value, hints.get(parameter, Any), f"{name}: {parameter}")
        return await calls(bound, **given)

    return Toolbox(call=call_tool, owner=instance, calls=calls)


async def use(tools: Toolbox, model: Model, task: dict[str, Any]) -> Outcome:
    """The episode: the policy's calls are answered until a reply has none, or a limit comes."""
    owner, call = tools.owner, tools.calls
    async with closing(owner, call):
        opening = await call(owner.reset, task) if isinstance(owner, Resets) else None
        answer = await converse(tools, model, messages_of(opening, task))
        earned = await call(owner.reward, answer) if isinstance(owner, Rewards) else 0.0
    if isinstance(earned, Outcome):
        return earned
    return Outcome(reward=earned)


async def converse(tools: Toolbox, model: Model, opening: Sequence[Message] | str) -> str:
    """Answers the policy's calls until a reply has none, and returns the text of that reply; it is
    empty where a limit comes before."""
    messages = messages_of(opening, {})
    try:
        while True:
            reply = await model.reply(messages)
            calls = read_calls(reply.text)
            if not calls:
                return reply.text
            messages = []
            for tool_call in calls:
                messages.append(await answered(tools, model, tool_call))
    except LimitReached:
        return ""


async def answered(tools: Toolbox, model: Model, tool_call: ToolCall) -> Message:
    """The tool's message: its result, or what was wrong with the call."""
    began = time.perf_counter()
    try:
        if tool_call.mistake:
            raise ValueError(tool_call.mistake)
        result = await tools.call(tool_call.name, tool_call.arguments)
    except TOLD as error:
        result = f"Error: {error}"
    model.segments.tool_s += time.perf_counter() - began
    return {"role": "tool", "name": tool_call.name, "content": text_of(result, tool_call.name)}


def text_of(result: Any, name: str) -> str:
    """A tool's result as the policy reads it: text as it is, other values as JSON."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, default=_as_json, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise EnvironmentMistake(
            f"the tool {name} returned {type(result).__name__} {shortened(result)}, which the policy "
            f"can't read ({error}); return text, numbers, lists, dicts or a dataclass"
        ) from None


def _as_json(value: Any) -> Any:
    """A value that json.dumps does not know, in types that it does."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        raise TypeError("bytes are no text; decode them")
    text = str(value)
    if ADDRESS.search(text):
        raise TypeError(f"a {type(value).__name__} has no text of its own")
    return text
