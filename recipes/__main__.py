"""python -m recipes lists the recipes; python -m recipes path/to/mine.yaml name=value ... runs
one of your own, which may stand anywhere."""

from __future__ import annotations

import sys

from recipes.composing import RecipeFile
from recipes.main import main
from recipes.usage import recipe_list


def run_any() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print(recipe_list())
        return
    main(lambda: RecipeFile.of(arguments[0]), arguments[1:])


if __name__ == "__main__":
    run_any()
