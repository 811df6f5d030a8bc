"""recipe(): what every recipe's main does: compose the settings, convert them once, run, and
tell mistakes plainly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from controllers import QUESTIONS, algorithm_entry
from hybridflow.disk import wait_for_room
from hybridflow.failures import may_be_retried
from hybridflow.supervision import SUPERVISION, supervise
from hybridflow.waiting import catch_interrupts
from recipes.composing import (
    PACKAGED,
    SEARCH,
    RecipeFile,
    compose,
    own_hydra,
    own_settings,
    to_settings,
)
from recipes.config import RunConfig
from recipes.errors import plain_errors
from recipes.flags import split_flags
from recipes.interruption import what_is_kept
from recipes.notice import keep_what_memory_holds
from recipes.override_values import quote_values
from recipes.overrides import join_tables, nearest_name
from recipes.roles import ROLES, role_names, section_of
from recipes.run import run as train
from recipes.settings_page import settings_page, unread_fields
from recipes.usage import usage

LOGGER = logging.getLogger(__name__)
HYDRA_SETTINGS = ("hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=none")
"""Hydra writes no files of its own and leaves logging alone."""
SUPERVISOR_FACTOR = 1.5
"""The controller's deadline for a sign of life, in call_timeout_s: longer than any call's."""
ROOM_BYTES = 1 << 20
"""A controller that takes over waits until the disk has room for so much."""
Run = Callable[[RunConfig], object]


def recipe(name: str, run: Run = train) -> Callable[[], None]:
    """The main of recipes/<name>.yaml; `run` is what it does with the settings."""
    return lambda: main(lambda: RecipeFile(name), sys.argv[1:], run)


def main(find: Callable[[], RecipeFile], arguments: Sequence[str], run: Run = train) -> None:
    """Runs the recipe that `find` returns, or answers --help and --settings."""
    settings: RunConfig | None = None

    def directory() -> Path | None:
        return None if settings is None else Path(settings.output_dir)

    def interrupted() -> str:
        trains = settings is not None and settings.algorithm.name not in QUESTIONS
        return what_is_kept(settings) if trains and settings is not None else "interrupted"

    with plain_errors(directory, interrupted):
        recipe = find()
        if {"--help", "-h"} & set(arguments):
            print(usage(recipe))
        elif "--settings" in arguments:
            at = list(arguments).index("--settings")
            print(settings_page(recipe, arguments[:at], arguments[at + 1 :]))
        elif any(argument.startswith("-") for argument in arguments):
            show_under_hydra(recipe, arguments)
        else:
            settings = to_settings(compose(recipe, arguments))
            if run is train and is_supervised(settings):
                SUPERVISION.on_leave = partial(keep_what_memory_holds, settings)
                supervise(
                    settings.output_dir,
                    max_restarts=settings.recovery.max_restarts,
                    stale_s=SUPERVISOR_FACTOR * settings.call_timeout_s,
                )
            with final_errors():
                if SUPERVISION.took_over:
                    wait_for_room(
                        Path(settings.output_dir), ROOM_BYTES, settings.recovery.disk_grace_s
                    )
                start(settings, arguments, run)


def is_supervised(settings: RunConfig) -> bool:
    """Whether this process is the command of a run that is to be started again where it dies."""
    spec = sys.modules["__main__"].__spec__
    is_command = spec is not None and spec.name.partition(".")[0] == "recipes"
    starts = not (settings.graph or settings.dry_run)
    return is_command and starts and settings.recovery.max_restarts > 0


@contextmanager
def final_errors() -> Iterator[None]:
    """Errors that a new controller would only repeat end the run, under a supervisor too: all but
    those of worker processes, and those as well once the run has counted them."""
    try:
        yield
    except BaseException as error:
        if not may_be_retried(error):
            SUPERVISION.mark_final()
        raise


def start(settings: RunConfig, arguments: Sequence[str], run: Run) -> None:
    """`run` with this process set up for it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    catch_interrupts()
    for line in unused_settings(arguments, settings):
        LOGGER.warning(line)
    run(settings)


def show_under_hydra(recipe: RecipeFile, arguments: Sequence[str]) -> None:
    """Hydra's own flags, which show the settings: --cfg job, --info."""
    flags, settings = split_flags(arguments, lambda name: nearest_name(name, own_settings(recipe)))
    compose(recipe, settings)  # its mistakes in one line
    directory = "pkg://recipes" if recipe.directory == PACKAGED else str(recipe.directory)

    @hydra.main(version_base="1.3", config_path=directory, config_name=recipe.name)
    def hydra_main(config: DictConfig) -> None:
        raise AssertionError("Hydra shows the settings and calls nothing")

    # Hydra's parser takes settings in one piece only.
    sys.argv[1:] = [*flags, *join_tables(quote_values(settings)), *HYDRA_SETTINGS]
    if recipe.directory != PACKAGED:
        sys.argv.append(SEARCH)
    with own_hydra():
        hydra_main()


def unused_settings(arguments: Sequence[str], config: RunConfig) -> Iterator[str]:
    """In words: settings of a model that the recipe does not have, and those that are about runs of
    another kind."""
    used = set(map(section_of, role_names(config)))
    models = ", ".join(sorted(used))
    unread = list(unread_fields(algorithm_entry(config.algorithm.name)))
    for argument in arguments:
        role, setting = argument.partition(".")[0], argument.partition("=")[0].lstrip("+")
        if role in ROLES and role not in used:
            yield (
                f"{argument}: nothing reads it, {config.algorithm.name} has no {role} (its "
                f"models: {models})"
            )
        elif any(f"{setting}.".startswith(f"{name}.") for name in unread):
            yield (
                f"{argument}: nothing reads it in {config.algorithm.name}; --settings lists what it "
                "reads"
            )
