"""make_settings(): the settings of a recipe, given in Python.

config = make_settings("grpo", ["model.path=...", "data.train=..."], reward=my_function)
config = make_settings("grpo", {"model.path": "...", "data.train": ["a.jsonl", "b.jsonl"], "seed": 1})
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from hybridflow.wording import kind_of
from recipes.composing import RecipeFile, compose, to_settings
from recipes.config import RunConfig
from recipes.main import unused_settings
from recipes.roles import role_names
from workers.reward_function import RewardFunction, function_name
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
    environment: Any = None,
    *,
    first: Sequence[str] = (),
) -> RunConfig:
    """The recipe's settings with these changes. `recipe` is a name or the path of a YAML; the
    settings may override what stands in `first`."""
    if not isinstance(recipe, str | Path):
        raise ValueError(
            f'recipe is {recipe!r}; give a recipe\'s name, such as "grpo", or the path of a YAML'
        )
    arguments = [*first, *as_arguments(settings)]
    config = to_settings(compose(RecipeFile.of(recipe), arguments))
    for line in unused_settings(arguments, config):
        LOGGER.warning(line)
    config = replace(
        config,
        reward=_with_function(config.reward, reward),
        cost=_with_function(config.cost, cost),
        gold=_with_function(config.gold, gold),
        environment=config.environment if environment is None else environment,
    )
    _check_that_roles_read(config, {"reward": reward, "cost": cost, "gold": gold})
    return config


def _check_that_roles_read(config: RunConfig, functions: Mapping[str, Scorer | None]) -> None:
    """A ValueError for a function of a role that the recipe does not have."""
    for name, function in functions.items():
        if function is None:
            continue
        roles = role_names(config)
        if name not in roles:
            hint = "set data.validation, or leave it out" if name == "gold" else "leave it out"
            raise ValueError(
                f"{name}={function_name(function)}: nothing reads it, "
                f"{config.algorithm.name} has no {name} (its models: {', '.join(roles)}); {hint}"
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
        for name in settings:
            if not isinstance(name, str):
                raise ValueError(f"settings: the name {name!r} is {kind_of(name)}, not text")
        return [f"{name}={_text(name, value)}" for name, value in settings.items()]
    if not isinstance(settings, Sequence) or isinstance(settings, bytes):
        raise ValueError(
            f'settings are {settings!r}; give {{"name": value}} or ["name=value", ...]'
        )
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
    if isinstance(value, Integral):  # numpy's too, whose repr is no number
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(name, inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "[" + ", ".join(_text(name, inner) for inner in value) + "]"
    raise ValueError(f"settings: {name} is {kind_of(value)}; give text, a number, a list or a dict")
