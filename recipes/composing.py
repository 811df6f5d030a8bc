"""compose(), to_settings(): a recipe's YAML and name=value arguments become plain dataclasses, or a
ValueError of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from controllers import algorithm_entry
from recipes.config import RunConfig, register
from recipes.override_values import quote_values
from recipes.overrides import (
    check_form,
    check_names,
    join_tables,
    nodes,
    schema_values,
    setting_names,
    unknown_setting,
)
from recipes.value_words import in_plain_words

PACKAGED = Path(__file__).parent
HYDRAS_OWN = ("full_key:", "object_type=", "reference_type=", "See https://hydra.cc")
"""Lines of Hydra's and OmegaConf's messages that say nothing to a user."""
SEARCH = "hydra.searchpath=[pkg://recipes]"
"""A YAML elsewhere may build on the project's own: defaults: [grpo, _self_]."""


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """RecipeFile("grpo") is recipes/grpo.yaml; RecipeFile("mine", Path("/here")) is
    /here/mine.yaml."""

    name: str
    directory: Path = PACKAGED

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.yaml"

    @property
    def command(self) -> str:
        """How it is run."""
        if self.directory == PACKAGED:
            return f"python -m recipes.{self.name}"
        return f"python -m recipes {self.path}"

    @staticmethod
    def of(text: str) -> RecipeFile:
        """From what a user wrote: the path of a YAML, or the name of a recipe."""
        path = Path(text)
        if path.suffix not in (".yaml", ".yml"):
            if text not in packaged_recipes():
                raise ValueError(
                    f"there is no recipe {text!r}; give the path of a YAML, or one of "
                    f"{', '.join(packaged_recipes())}"
                )
            return RecipeFile(text)
        if not path.is_file():
            raise ValueError(f"recipe {text}: there is no such file")
        if path.suffix == ".yml":
            raise ValueError(f"recipe {text}: Hydra reads .yaml files only; rename it")
        return RecipeFile(path.stem, path.absolute().parent)


def packaged_recipes() -> list[str]:
    """Names of the project's own recipes."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def compose(recipe: RecipeFile, arguments: Sequence[str]) -> DictConfig:
    """The recipe's settings with the arguments over them, as Hydra holds them."""
    register()
    check_form(arguments)
    check_names(arguments, lambda: own_settings(recipe))
    overrides = join_tables(quote_values(arguments))
    if recipe.directory != PACKAGED:
        overrides.append(SEARCH)
        check_recipe_file(recipe)
    directory = str(recipe.directory)
    with own_hydra(), initialize_config_dir(version_base="1.3", config_dir=directory):
        try:
            return hydra.compose(config_name=recipe.name, overrides=overrides)
        except MissingConfigException as error:
            raise ValueError(missing_config(recipe, error)) from error
        except yaml.MarkedYAMLError as error:
            raise ValueError(f"{recipe.path}: {error.problem}{yaml_line(error)}") from error
        except OverrideParseException as error:
            raise ValueError(
                f"{error.override}: the value can't be read ({str(error).splitlines()[0]}); check "
                "its brackets, braces and quotes, and put texts in it into quotes"
            ) from error
        except HydraException as error:
            offered = setting_names()
            if arguments:
                offered = own_settings(recipe)
            raise ValueError(composition_problem(recipe, error, offered)) from error


def own_settings(recipe: RecipeFile) -> list[str]:
    """Names of the settings that the recipe reads; every setting's where it can't be composed."""
    from recipes.settings_page import read_settings  # which composes recipes

    try:
        config = compose(recipe, [])
        entry = algorithm_entry(config.algorithm.name)
    except ValueError:
        return setting_names()
    return [setting.name for setting in read_settings(config, entry)]


def check_recipe_file(recipe: RecipeFile) -> None:
    """A user's YAML is readable, and builds on a recipe or on the schema."""
    try:
        content = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{recipe.path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{recipe.path}: {error.problem}{yaml_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("defaults"), list):
        raise ValueError(
            f"{recipe.path}: it has no list `defaults`; begin it with defaults: [grpo, _self_] to "
            "build on a recipe (docs/recipes.md)"
        )


@contextmanager
def own_hydra() -> Iterator[None]:
    """Hydra keeps one state per process; whoever uses it already gets it back."""
    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        yield
    finally:
        GlobalHydra.set_instance(state)
        state.hydra = before


def yaml_line(error: yaml.MarkedYAMLError) -> str:
    return "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"


def missing_config(recipe: RecipeFile, error: MissingConfigException) -> str:
    """A defaults list that names what is not there."""
    missing = str(error.missing_cfg_file or recipe.name)
    group, _, name = missing.rpartition("/")
    known = ", ".join(error.options or ())
    return f"{recipe.path}: defaults: there is no {group or 'recipe'} {name!r}" + (
        f"; known: {known}" if known else ""
    )


def composition_problem(recipe: RecipeFile, error: HydraException, offered: Sequence[str]) -> str:
    """Hydra's and OmegaConf's messages have a summary, a cause and the setting's full name on
    lines of their own; this is one line with all three."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines()]
    named = re.search(r"full_key: (\S+)", str(cause))
    setting = named[1] if named else ""
    if cause is error and lines[0].startswith("In '"):
        lines.pop(0)
        where = str(recipe.path)
    else:
        where = str(error).splitlines()[0].removeprefix("Error merging override ")
        overridden = re.fullmatch(r"Could not override '([\w.]+)'\.?", where)
        if overridden is not None:
            where = overridden[1]
    if setting and re.match(r"Key '.*' (?:not in|is not in struct)", lines[0]):
        known = setting_names()
        if where in known and where.startswith("algorithm."):
            return f"{where}: recipe {recipe.name} has no such setting{other_place(where)}"
        return f"{where}: {unknown_setting(setting, offered)}"
    if where == str(recipe.path) and setting:
        return f"{where}: {setting}: {in_plain_words(lines[0])}"
    problem = in_plain_words(" ".join(line for line in lines if not line.startswith(HYDRAS_OWN)))
    return problem if cause is error else f"{where.lstrip('+')}: {problem}"


def other_place(setting: str) -> str:
    """Where a recipe whose algorithm lacks the setting may have it."""
    if setting.startswith("algorithm.kl."):
        return "; the coefficient of the KL in its loss is actor.loss.kl_coefficient"
    return "; --settings algorithm lists those that it has"


def to_settings(config: DictConfig) -> RunConfig:
    """The plain dataclasses; a missing or wrong value is a ValueError with its name."""
    missing = sorted(missing_settings(config))
    if missing:
        raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except InterpolationKeyError as error:
        raise ValueError(
            f"{error.full_key}: {str(error).splitlines()[0]}; ${{...}} is the value of another "
            "setting, and an environment variable is written $NAME"
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {in_plain_words(str(error))}") from error


def missing_settings(config: DictConfig) -> Iterator[str]:
    """Names of the mandatory settings that have no value.

    A mandatory setting that refers to another one, which is null (data.train of recipes.evaluate is
    ${data.validation}), is told by that one's name. What refers to a mandatory setting
    (critic.model.path to model.path) is not listed beside it.
    """
    written = dict(nodes(OmegaConf.to_container(config), ""))
    for name, value in written.items():
        if value == MISSING:
            yield name
    for name, value in schema_values(RunConfig).items():
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(written.get(name)))
        if value == MISSING and reference is not None and OmegaConf.select(config, name) is None:
            yield reference[1]
