"""make_settings(): the settings of a recipe, given in Python.

config = make_settings("grpo", ["model.path=...", "data.train=..."], reward=my_function)
config = make_settings("grpo", {"model.path": "...", "data.train": ["a.jsonl", "b.jsonl"], "seed": 1})
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

import recipes
from recipes.config import RunConfig, register
from recipes.main import check_names, join_pools, to_settings, unused_settings
from workers.reward_function import RewardFunction
from workers.role_config import RewardConfig

LOGGER = logging.getLogger(__name__)
Settings = Sequence[str] | Mapping[str, object]
"""["name=value", ...] as on the command line, or {"name": value}."""
Scorer = str | RewardFunction
"""A function, or "package.module:name"."""


def make_settings(
    recipe: str,
    settings: Settings = (),
    reward: Scorer | None = None,
    cost: Scorer | None = None,
    gold: Scorer | None = None,
    *,
    first: Sequence[str] = (),
) -> RunConfig:
    """The recipe's settings with these changes; `first` are defaults of the caller that they may override."""
    known = sorted(path.stem for path in Path(recipes.__file__).parent.glob("*.yaml"))
    if recipe not in known:
        raise ValueError(f"recipe is {recipe!r}; known: {', '.join(known)}")
    arguments = [*first, *as_arguments(settings)]
    check_names(arguments)
    register()
    with _own_hydra(), initialize_config_module("recipes", version_base="1.3"):
        try:
            composed = compose(recipe, join_pools(arguments))
        except HydraException as error:
            raise ValueError(": ".join(line.strip() for line in str(error).splitlines() if line)) from error
    config = to_settings(composed)
    for line in unused_settings(arguments, config):
        LOGGER.warning(line)
    return replace(
        config,
        reward=_with_function(config.reward, reward),
        cost=_with_function(config.cost, cost),
        gold=_with_function(config.gold, gold),
    )


def _with_function(config: RewardConfig, function: Scorer | None) -> RewardConfig:
    return config if function is None else replace(config, function=function)


def as_arguments(settings: Settings) -> list[str]:
    """name=value texts.

    >>> as_arguments({"seed": 1, "data.train": ["a b.jsonl"], "metrics.tensorboard": True})
    ['seed=1', "data.train=['a b.jsonl']", 'metrics.tensorboard=true']
    """
    if isinstance(settings, str):
        raise ValueError(f'settings are {settings!r}; give a list, ["{settings}"], or a dict')
    if isinstance(settings, Mapping):
        return [f"{name}={_text(name, value)}" for name, value in settings.items()]
    for text in settings:
        if not isinstance(text, str) or "=" not in text:
            raise ValueError(f"settings: {text!r} is not name=value")
    return list(settings)


def _text(name: str, value: object) -> str:
    """A value in the words of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(name, inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_text(name, inner) for inner in value) + "]"
    raise ValueError(f"settings: {name} is a {type(value).__name__}; give text, a number, a list or a dict")


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra keeps one state per process; whoever uses it already gets it back."""
    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        yield
    finally:
        GlobalHydra.set_instance(state)
        state.hydra = before
