"""as_episode(): whatever `environment=` names, as an episode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from hybridflow.registry import load_object
from hybridflow.wording import kind_of
from workers.agents.environment import Environment, play
from workers.agents.executor import Episode
from workers.agents.live import Task
from workers.agents.model import Model
from workers.agents.renderer import Message
from workers.agents.threads import Caller
from workers.agents.tools import Rewards, schemas_of, tool_names, toolbox, use, vars_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """An episode, and what is known of it before the first one runs."""

    name: str
    episode: Episode
    roles: tuple[str, ...]
    """Roles of the messages that follow a reply; empty where the code may send any."""
    tools: Sequence[Message] = ()
    """The schemas that the chat template is given."""
    rewards: bool = True
    """Whether the episode itself knows its reward."""


def environment_name(environment: Any) -> str:
    """Its name in messages and in the run's written settings: package.module:name."""
    if isinstance(environment, str):
        return environment
    if isinstance(environment, partial):
        return environment_name(environment.func)
    if inspect.isroutine(environment) or inspect.isclass(environment):
        return f"{environment.__module__}:{environment.__qualname__}"
    return f"{type(environment).__module__}:{type(environment).__qualname__}"


def as_episode(environment: Any) -> Interface:
    """The interface of an object or of what a name stands for; a ValueError for anything that is
    none."""
    name = environment_name(environment)
    value = environment
    if isinstance(environment, str):
        value = load_object(environment, "environment")
    if is_async(value):
        _check_call(name, value, "the function", ("model", "task"))
        return Interface(name=name, episode=value, roles=())
    kind = value.func if isinstance(value, partial) else value
    if inspect.isclass(kind):
        _check_class(name, kind, value)
    if inspect.isclass(kind) and issubclass(kind, Environment):
        return Interface(name=name, episode=_of_environments(value), roles=("user",))
    if inspect.isclass(kind) and tool_names(kind):
        return Interface(
            name=name,
            episode=_of_tools(value),
            roles=("tool",),
            tools=schemas_of(kind),
            rewards=issubclass(kind, Rewards),
        )
    raise ValueError(
        f"environment={name!r} is {_kind_of(value)}; name an async function of (model, "
        "task), a class with reset and step, or a class whose methods are tools (with arguments: a "
        "functools.partial of it)"
    )


def _kind_of(value: Any) -> str:
    """The value's kind, in words that say why it is no environment."""
    if inspect.isclass(value):
        found = [method for method in ("reset", "step") if method in vars_of(value)]
        return f"a class with {found[0]} alone" if found else "a class without methods"
    if inspect.isasyncgenfunction(value):
        return "an async generator (return the reward, yield nothing)"
    if inspect.isfunction(value):
        return "a function without async"
    return kind_of(value)


METHODS = {"reset": ("task",), "step": ("action",), "reward": ("answer",), "close": ()}
"""The methods of a class that are called by position, and with what."""


def _check_class(name: str, kind: type, make: Callable[[], Any]) -> None:
    """A ValueError where `make`, the class or a partial of it, or a method can't be called as
    episodes do."""
    _check_call(name, make, "the class", ())
    instance = object()
    for method, arguments in METHODS.items():
        member = inspect.getattr_static(kind, method, None)
        if inspect.isfunction(member) and (method != "step" or issubclass(kind, Environment)):
            bound = MethodType(member, instance)
            _check_call(name, bound, f"its method {method}", arguments)


def _check_call(
    name: str, function: Callable[..., Any], what: str, arguments: tuple[str, ...]
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # builtins have none, and partials whose arguments don't fit
        if isinstance(function, partial):
            _check_partial(name, function, what)
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        fix = "give it these parameters"
        if not arguments:
            fix += ", or name a partial of it that has the others"
        raise ValueError(
            f"environment={name}: {what} takes {signature}, and is called with "
            f"({', '.join(arguments)}) ({error}); {fix}"
        ) from None


def _check_partial(name: str, function: partial[Any], what: str) -> None:
    signature = inspect.signature(function.func)
    try:
        signature.bind_partial(*function.args, **function.keywords)
    except TypeError as error:
        raise ValueError(
            f"environment={name}: {what} takes {signature}, and the partial of it gives other arguments "
            f"({error}); correct the partial"
        ) from None


def is_async(value: Any) -> bool:
    """Whether calling it gives a coroutine: async def, or an object whose __call__ is one."""
    if inspect.isclass(value) or not callable(value):
        return False
    return inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__)


def _of_environments(make: Callable[[], Environment]) -> Episode:
    async def episode(model: Model, task: Task) -> Any:
        call = Caller()
        return await play(await call(make), model, task, call)

    return episode


def _of_tools(make: Callable[[], Any]) -> Episode:
    async def episode(model: Model, task: Task) -> Any:
        call = Caller()
        return await use(toolbox(await call(make), call), model, task)

    return episode
