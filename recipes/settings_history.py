"""The settings that a run's steps were trained with, where it was resumed with other ones.

    config.yaml                            those of the newest steps
    settings/after-step-00000000.yaml      those of the first steps
    settings/after-step-00000003.yaml      those of the steps after step 3

The directory is made by the first resume that changes something a step may depend on; replay.py
reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from hybridflow.whole_file import whole_file
from recipes.config import RunConfig
from recipes.roles import with_named_functions

CONFIG = "config.yaml"
HISTORY = "settings"
NAME = "after-step-{:08d}.yaml"
OF_NO_STEP = ("output_dir", "dry_run", "graph", "loop", "metrics", "recovery", "cluster")
"""Settings, and groups of them, that no step depends on."""


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
        if _of_steps(OmegaConf.to_container(OmegaConf.load(last))) != _of_steps(settings):
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


def _begins(output_dir: Path) -> list[int]:
    paths = (output_dir / HISTORY).glob("after-step-*.yaml")
    return sorted(int(path.stem.rpartition("-")[2]) for path in paths)


def _of_steps(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OF_NO_STEP}


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)
