"""recipe(): what every recipe's main does with Hydra: compose, convert once, run, and tell mistakes plainly."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import cast

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.config import RunConfig, register
from recipes.run import run


def recipe(name: str) -> Callable[[], None]:
    """The main of recipes/<name>.yaml."""
    register()

    @hydra.main(version_base="1.3", config_path="pkg://recipes", config_name=name)
    def main(config: DictConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        try:
            settings = to_settings(config)
            run(settings)
        except ValueError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return cast(Callable[[], None], main)


def to_settings(config: DictConfig) -> RunConfig:
    """The plain dataclasses; a missing or wrong value is a ValueError with its name."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
