"""recipe(): what every recipe's main does with Hydra: compose, convert once, run, and tell mistakes
plainly."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import hydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from controllers import ENTRIES
from hybridflow.waiting import catch_interrupts
from recipes.config import NO_MODEL, RunConfig, register
from recipes.roles import ROLES, role_names
from recipes.run import run

LOGGER = logging.getLogger(__name__)
FREE = ("hydra.", "pools.", "data.chat_template_options.")
"""Below these the user chooses the names, or Hydra knows them."""


def recipe(name: str, run: Callable[[RunConfig], object] = run) -> Callable[[], None]:
    """The main of recipes/<name>.yaml; `run` is what it does with the settings."""
    register()

    @hydra.main(version_base="1.3", config_path="pkg://recipes", config_name=name)
    def main(config: DictConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        catch_interrupts()
        with plain_errors():
            settings = to_settings(config)
            for line in unused_settings(sys.argv[1:], settings):
                LOGGER.warning(line)
            run(settings)

    def checked() -> None:
        with plain_errors():
            check_names(sys.argv[1:])
        sys.argv[1:] = join_pools(sys.argv[1:])
        main()

    return checked


@contextmanager
def plain_errors() -> Iterator[None]:
    """A ValueError is the user's: its message is what they need, the stack is not (HYDRA_FULL_ERROR=1 shows
    it)."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_settings(config: DictConfig) -> RunConfig:
    """The plain dataclasses; a missing or wrong value is a ValueError with its name."""
    written = OmegaConf.to_container(config)
    missing = sorted(_missing(written, ""))
    if cast(dict[str, Any], written)["data"]["train"] == "${data.validation}" and config.data.train is None:
        missing.append("data.validation")
    if missing:
        raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
    for role in ("reward", "gold", "cost"):
        if config[role].model is not None and config[role].model.path == NO_MODEL:
            config = cast(DictConfig, OmegaConf.merge(config, {role: {"model": None}}))
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error


def _missing(value: object, name: str) -> Iterator[str]:
    """Names of the mandatory values; what only refers to one of them (critic.model.path to model.path) is not
    listed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _missing(inner, f"{name}.{key}" if name else str(key))
    elif value == MISSING:
        yield name


def unused_settings(arguments: Sequence[str], config: RunConfig) -> Iterator[str]:
    """In words: settings of a model that the recipe does not have."""
    used = {"actor" if name == "generator" else name for name in role_names(config)}
    for argument in arguments:
        role = argument.partition(".")[0]
        if role in ROLES and role not in used:
            yield f"{argument}: nothing reads it, {config.algorithm.name} has no {role} (its models: {', '.join(sorted(used))})"


def check_names(arguments: Sequence[str]) -> None:
    """ValueError for name=value with a name that no setting has; Hydra's own advice (+name) would not
    help."""
    known = _names()
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not equals or not name.replace(".", "").isidentifier() or name in known or name.startswith(FREE):
            continue
        last = name.rpartition(".")[2]
        same = [other for other in known if other.rpartition(".")[2] == last]
        near = get_close_matches(name, same, n=3, cutoff=0.0) or get_close_matches(name, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "--cfg job lists them all"
        raise ValueError(f"{argument}: there is no setting {name!r}; {advice}")


def join_pools(arguments: Sequence[str]) -> list[str]:
    """pools.NAME.FIELD=VALUE, which Hydra can't set because NAME is new, as one value: +pools={NAME: {FIELD:
    VALUE}}.

    >>> join_pools(["pools.a.num_devices=2", "pools.a.roles=[actor]", "seed=1"])
    ['seed=1', '+pools={a: {num_devices: 2, roles: [actor]}}']
    """
    pools: dict[str, dict[str, str]] = {}
    rest = []
    for argument in arguments:
        if found := re.fullmatch(r"pools\.(\w+)\.(\w+)=(.*)", argument):
            pools.setdefault(found[1], {})[found[2]] = found[3]
        else:
            rest.append(argument)
    text = ", ".join(
        f"{name}: {{{', '.join(f'{field}: {value}' for field, value in fields.items())}}}"
        for name, fields in pools.items()
    )
    return [*rest, f"+pools={{{text}}}"] if pools else rest


def _names() -> list[str]:
    """Every setting's full name, of all algorithms."""
    trees = [OmegaConf.structured(RunConfig)] + [
        OmegaConf.create({"algorithm": OmegaConf.structured(entry.load_config())})
        for entry in ENTRIES.values()
    ]
    return list(dict.fromkeys(name for tree in trees for name in _paths(OmegaConf.to_container(tree), "")))


def _paths(value: object, name: str) -> Iterator[str]:
    if name:
        yield name
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{name}.{key}" if name else str(key))
