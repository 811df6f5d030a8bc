"""Recipes: what to run. A YAML here is a recipe: `python -m recipes.grpo` runs recipes/grpo.yaml
with no file of code of its own.

A recipe that needs more than settings (recipes.plan, recipes.quickstart) is a module like any
other, and is found first. `python -m recipes` lists all, and runs a YAML that stands elsewhere.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from recipes.errors import leave

HERE = Path(__file__).parent


class YamlRecipes:
    """Python asks it for the modules that no file defines: recipes.NAME is recipes/training.py
    where there is a recipes/NAME.yaml."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, recipe = name.rpartition(".")
        if package != __name__ or not (HERE / f"{recipe}.yaml").is_file():
            return None
        return spec_from_file_location(name, HERE / "training.py")


# What is registered first runs last.
atexit.register(leave)
if YamlRecipes not in sys.meta_path:
    sys.meta_path.append(YamlRecipes)
