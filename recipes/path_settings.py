"""expand_paths(): ~ and environment variables in every setting that is a path, whether it comes
from the command line, a YAML or Python.

A shell expands them only where they begin a word: not in model.path=~/m, and not in a YAML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

PathFields = Mapping[type, tuple[str, ...]]
"""Class of settings -> its fields that are paths, or may be."""
VARIABLE = re.compile(r"(?:^|/)\$(\w+|\{\w+\})(?=/|$)")


def expand_paths(
    settings: Any, paths: Sequence[str], below: PathFields = MappingProxyType({}), name: str = ""
) -> None:
    """Expands the fields `paths` of `settings`, a dataclass, and those that `below` names of the
    settings inside it; `name` is its own, with a dot behind it."""
    for field in fields(settings):
        value = vars(settings)[field.name]
        setting = f"{name}{field.name}"
        if field.name in paths:
            vars(settings)[field.name] = expanded(value, setting)
        elif is_dataclass(value):
            expand_paths(value, below.get(type(value), ()), below, f"{setting}.")


def expanded(value: Any, setting: str) -> Any:
    """A path, or what holds paths: a list, or a dictionary of texts."""
    if isinstance(value, str):
        return expanded_path(value, setting)
    if isinstance(value, Mapping):
        return {key: expanded(inner, setting) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(inner, setting) for inner in value]
    return value


def expanded_path(path: str, setting: str) -> str:
    """The path; a ValueError names a variable that is not set, and a user who does not exist."""
    text = os.path.expandvars(path)
    if text.startswith("~"):
        text = str(Path(text).expanduser()) if has_home(text) else text
    variable = VARIABLE.search(text)
    if variable is not None and not Path(text).exists():
        raise ValueError(
            f"{setting} is {path!r}, but the environment variable "
            f"{variable[1].strip('{}')} is not set; set it, or write the path"
        )
    return text


def make_directory(directory: object, setting: str) -> Path:
    """Makes it and returns its whole path; a ValueError with the setting's name where that can't
    be done, or it can't be written to."""
    if not isinstance(directory, str | Path) or not str(directory).strip():
        raise ValueError(f"{setting}: {directory!r} names no directory; give one")
    path = Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{setting}: {path} is a file; name a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
    else:
        if os.access(path, os.W_OK):
            return path
        why = "it can't be written to"
    raise ValueError(f"{setting}: {path} can't be made or used ({why}); name another directory")


def has_home(path: str) -> bool:
    """Whether ~ or ~user at its beginning means a directory."""
    return os.path.expanduser(path) != path  # noqa: PTH111
