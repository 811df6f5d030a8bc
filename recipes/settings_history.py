"""The settings that a run's steps were trained with, where it was resumed with other ones.

    config.yaml                            those of the newest steps
    settings/after-step-00000000.yaml      those of the first steps
    settings/after-step-00000003.yaml      those of the steps after step 3

The directory is made by the first resume that changes something a step may depend on; replay.py
reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hybridflow.whole_file import whole_file
from recipes.config import RunConfig
from recipes.diff import flat
from recipes.roles import with_named_functions

CONFIG = "config.yaml"
HISTORY = "settings"
NAME = "after-step-{:08d}.yaml"
OF_NO_STEP = ("output_dir", "dry_run", "graph", "loop", "metrics", "recovery", "cluster")
"""Settings, and groups of them, that no step depends on."""
MOST_SETTINGS = 8
"""Settings that differ, as many as one line names."""


def settings_tree(config: RunConfig) -> dict[str, Any]:
    """All settings, functions by their names."""
    tree = OmegaConf.to_container(OmegaConf.structured(with_named_functions(config)))
    return cast(dict[str, Any], tree)


def write_settings(output_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
    """config.yaml of a run that goes on after `first_step`; what its earlier steps were trained
    with is kept where that was something else."""
    path, history = output_dir / CONFIG, output_dir / HISTORY
    text = OmegaConf.to_yaml(OmegaConf.create(dict(settings)))
    if not first_step:
        shutil.rmtree(history, ignore_errors=True)
    elif path.is_file():
        begins = _begins(output_dir)
        for step in begins:
            if step >= first_step:  # of steps that are trained again
                (history / NAME.format(step)).unlink()
        before = _begins(output_dir)
        last = history / NAME.format(before[-1]) if before else path
        if _of_steps(_tree(last)) != _of_steps(settings):
            history.mkdir(exist_ok=True)
            if not before:
                _write(history / NAME.format(0), path.read_text())
            _write(history / NAME.format(first_step), text)
    _write(path, text)


def settings_of_step(output_dir: Path, step: int) -> tuple[Path, int]:
    """The file with the settings that a step was trained with, and the step after which they
    hold."""
    begins = [begin for begin in _begins(output_dir) if begin < step]
    if not begins:
        return output_dir / CONFIG, 0
    return output_dir / HISTORY / NAME.format(begins[-1]), begins[-1]


def other_settings(
    config: RunConfig, output_dir: Path, but: Collection[str] = (), *, loop: bool = False
) -> str:
    """In words: the settings that are not as the run's newest steps had them, those of the loop where
    they are asked for; empty where all are. `but`: those that nobody set."""
    path = output_dir / CONFIG
    if not path.is_file():
        return ""
    left_out = tuple(f"{name}." for name in OF_NO_STEP if name != "loop" or not loop)
    words = []
    for name, value, before in differing_values(settings_tree(config), _tree(path)):
        if name not in but and not f"{name}.".startswith(left_out):
            words.append(f"{name} is {value} now and was {before}")
    more = len(words) - MOST_SETTINGS
    return "; ".join(words[:MOST_SETTINGS]) + (f"; and {more} more" if more > 0 else "")


def differing_values(first: Any, second: Any) -> Iterator[tuple[str, object, object]]:
    """Name and both values of each setting that two trees have differently, enums by their names."""
    first, second = flat(first, ""), flat(second, "")
    for name in sorted(first.keys() | second.keys()):
        pair = first.get(name), second.get(name)
        if _plain(pair[0]) != _plain(pair[1]):
            yield name, *pair


def derived_names(settings: RunConfig, config: RunConfig) -> frozenset[str]:
    """The settings of `config` that were left open in `settings`."""
    pairs = differing_values(settings_tree(settings), settings_tree(config))
    return frozenset(name for name, *_ in pairs)


def _begins(output_dir: Path) -> list[int]:
    paths = (output_dir / HISTORY).glob("after-step-*.yaml")
    return sorted(int(path.stem.rpartition("-")[2]) for path in paths)


def _of_steps(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OF_NO_STEP}


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def _tree(path: Path) -> Any:
    """A ValueError for a file that is no YAML any more."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(
            f"output_dir: {path} can't be read ({' '.join(str(error).split())}); the settings of "
            "earlier steps were there: remove it to go on without"
        ) from error


def _plain(value: object) -> object:
    """As YAML has it, where enums are names."""
    return str(getattr(value, "value", value))
