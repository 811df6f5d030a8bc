"""The command lines of recipes.plan, recipes.calibrate and recipes.reshard_plan: name=value
arguments over a dataclass of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.path_settings import expand_paths
from recipes.value_words import in_plain_words

Settings = TypeVar("Settings")
HELP = ("-h", "--help")


def read_arguments(
    schema: type[Settings],
    arguments: Sequence[str],
    renamed: Mapping[str, str] | None = None,
    paths: Sequence[str] = (),
) -> Settings:
    """name=value arguments over the defaults of the dataclass `schema`.

    An unknown name, a value of the wrong type and a missing value are a ValueError that names the
    setting; `renamed` has the new names of settings that were called otherwise before, and `paths`
    are those in which ~ and environment variables are expanded.
    """
    config = OmegaConf.structured(schema)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(
                f"argument {argument!r} is not of the form name=value; --help lists the names"
            )
        if renamed and name in renamed:
            raise ValueError(f"{argument}: {name} is now {renamed[name]}")
        if not _is_known(name, schema):
            raise ValueError(f"{argument}: there is no setting {name!r}; {_advice(name, schema)}")
        try:
            change = OmegaConf.from_dotlist([argument])
            # A text is taken as it stands: YAML would cut it at " #".
            if _is_text(name, schema):
                change = OmegaConf.create({name: value})
            config = OmegaConf.merge(config, change)
        except yaml.YAMLError:
            raise ValueError(
                f"{name} is {value!r}, which is no YAML; check brackets and quotes"
            ) from None
        except OmegaConfBaseException as error:
            raise ValueError(f"{argument}: {in_plain_words(str(error))}") from None
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
    settings = cast(Settings, OmegaConf.to_object(config))
    expand_paths(settings, paths)
    return settings


def usage(page: str | None, schema: type, file: str) -> str:
    """The text of --help: the module's page, then every setting of `schema`, which is in
    `file`, with its default."""
    lines = [f"  {entry.name}={_shown(_default(entry))}" for entry in fields(schema)]
    heading = f"Settings with their defaults (what they mean: {schema.__name__} in {file}):"
    return "\n".join([str(page), heading, *lines])


def _is_known(name: str, schema: type) -> bool:
    """Whether `name` is a field, or an entry of a field that is a dict, whose keys the user
    chooses."""
    first, dot, _ = name.partition(".")
    for entry in fields(schema):
        if entry.name == first:
            return not dot or isinstance(_default(entry), dict)
    return False


def _is_text(name: str, schema: type) -> bool:
    return any(entry.name == name and entry.type == "str" for entry in fields(schema))


def _advice(name: str, schema: type) -> str:
    """The names that look like `name`, or like its last part."""
    known = [entry.name for entry in fields(schema)]
    near = get_close_matches(name, known, n=3) or get_close_matches(
        name.rpartition(".")[2], known, n=3
    )
    if not near:
        return "--help lists them all"
    return f"did you mean {' or '.join(near)}?"


def _default(entry: Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def _shown(value: Any) -> str:
    if value in (MISSING, "???"):
        return ""
    if isinstance(value, Enum):
        return str(value.value)
    return str(value)
