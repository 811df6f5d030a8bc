"""Registry: code that a setting names.

The value of such a setting (actor.train.engine, actor.generation.engine, actor.loss.name) is one of

- a built-in name: an entry of the registry's own table;
- a name that an installed package declares in the registry's entry point group:
      [project.entry-points."hybridflow.training_engines"]
      mine = "my_package.engine:MyEngine"
- "my_package.engine:MyEngine" itself.

Nothing is imported before it is asked for. Every process looks a name up for itself, Ray's workers
too, so the module must be importable on every node. Registering by calling a function is left out:
such a call would have to be repeated in every process.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """ENGINES = Registry(group="hybridflow.training_engines", builtin={"fsdp":
    "workers...:FsdpEngine"})

    ENGINES.load("fsdp", field="actor.train.engine")
    """

    group: str
    """Entry point group in which other packages declare names."""
    builtin: Mapping[str, str]
    """Name -> "module:attribute"."""

    def __iter__(self) -> Iterator[str]:
        """All known names, the built-in ones first."""
        return iter(self.locations())

    def locations(self) -> dict[str, str]:
        """Every known name -> "module:attribute". A ValueError for a name that two packages
        declare."""
        known = dict(self.builtin)
        for entry in installed_entry_points(self.group):
            location = f"{entry.module}:{entry.attr}"
            if known.get(entry.name, location) != location:
                raise ValueError(
                    f"entry point group {self.group}: {entry.name} is {location} and "
                    f"{known[entry.name]}; rename it in one of the two packages"
                )
            known[entry.name] = location
        return known

    def load(self, name: str, field: str) -> Any:
        """The object that `name` stands for; `field` is the setting, for the ValueError of a name that is
        not known or whose module cannot be imported."""
        if ":" in name:
            return load_object(name, field)
        # Built-in names need no look at all installed packages.
        known = self.builtin if name in self.builtin else self.locations()
        if name not in known:
            raise ValueError(
                f"{field} is {name!r}; known: {', '.join(known)}, or package.module:Name"
            )
        return load_object(known[name], field)

    def load_class(self, name: str, field: str, base: ABCMeta) -> Any:
        """The same for a concrete subclass of `base`; the ValueError names the methods that it
        lacks."""
        loaded = self.load(name, field)
        if not isinstance(loaded, ABCMeta) or not issubclass(loaded, base):
            raise ValueError(
                f"{field} is {name!r}, which is no subclass of {base.__module__}.{base.__name__}"
            )
        if loaded.__abstractmethods__:
            raise ValueError(
                f"{field} is {name!r}, a class without "
                f"{', '.join(sorted(loaded.__abstractmethods__))}; "
                f"{base.__module__}.{base.__name__} says what they do"
            )
        return loaded


def installed_entry_points(group: str) -> EntryPoints:
    """Those of all packages on the search path, read again where it or one of its folders changed."""
    folders = []
    for name in sys.path:
        folder = Path(name)
        modified = folder.stat().st_mtime_ns if folder.exists() else 0
        folders.append((name, modified))
    return _entry_points(group, tuple(folders))


@lru_cache(maxsize=16)
def _entry_points(group: str, folders: tuple[tuple[str, int], ...]) -> EntryPoints:
    """Reading the metadata of all packages takes a fifth of a second."""
    return entry_points(group=group)


def load_object(path: str, field: str) -> Any:
    """The object that "package.module:name" names; every way in which that can fail is a ValueError with
    the setting's name."""
    module_name, separator, name = path.partition(":")
    if not separator or not name:
        raise ValueError(f"{field}={path!r}: write it as package.module:name")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").removeprefix("./").replace("/", ".")
        fix = f"name the module: {dotted}:{name}"
        if dotted.startswith("."):  # absolute, or above this directory
            folder, _, last = module_name.removesuffix(".py").rpartition("/")
            fix = f"put {folder or '/'} on PYTHONPATH and name the module: {last}:{name}"
        raise ValueError(f"{field}={path!r} names a file; {fix}")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        # The module is somebody else's: whatever it raises (a missing library, a syntax error, the
        # exit of a script), the run does not start.
        raise ValueError(
            f"{field}={path!r}: module {module_name!r} can't be imported ({type(error).__name__}: "
            f"{error}); it must be importable on every node"
        ) from error
    if name not in vars(module):
        near = get_close_matches(name, [other for other in vars(module) if other[0] != "_"], n=1)
        fix = "name what the module defines"
        if near:
            fix = f"did you mean {module_name}:{near[0]}?"
        raise ValueError(f"{field}={path!r}: {module_name} has no {name!r}; {fix}")
    return vars(module)[name]
