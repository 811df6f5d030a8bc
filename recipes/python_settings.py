"""make_settings(): the settings of a recipe, given in Python.

config = make_settings("grpo", ["model.path=...", "data.train=..."], reward=my_function)
config = make_settings("grpo", {"model.path": "...", "data.train": ["a.jsonl", "b.jsonl"], "seed": 1})
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from recipes.composing import RecipeFile, compose, to_settings
from recipes.config import RunConfig
from recipes.main import unused_settings
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
    environment: Any = None,
    *,
    first: Sequence[str] = (),
) -> RunConfig:
    """The recipe's settings with these changes. `recipe` is a name or the path of a YAML; the
    settings may override what stands in `first`."""
    arguments = [*first, *as_arguments(settings)]
    config = to_settings(compose(RecipeFile.of(recipe), arguments))
    for line in unused_settings(arguments, config):
        LOGGER.warning(line)
    return replace(
        config,
        reward=_with_function(config.reward, reward),
        cost=_with_function(config.cost, cost),
        gold=_with_function(config.gold, gold),
        environment=config.environment if environment is None else environment,
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
    raise ValueError(
        f"settings: {name} is a {type(value).__name__}; give text, a number, a list or a dict"
    )
