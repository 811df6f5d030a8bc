"""usage(): what --help says of a recipe; recipe_list(): what `python -m recipes` says."""

from __future__ import annotations

from importlib import import_module
from textwrap import fill

from controllers import ENTRIES, QUESTIONS, AlgorithmEntry, algorithm_entry
from recipes.composing import RecipeFile, compose, missing_settings, packaged_recipes
from recipes.roles import SCORERS

WIDTH = 110


def usage(recipe: RecipeFile) -> str:
    """A few lines: what it trains, what must be set, and where to go on."""
    config = compose(recipe, [])
    entry = algorithm_entry(config.algorithm.name)
    needed = sorted(missing_settings(config))
    example = [f"{name}=..." for name in needed]
    for role in entry.roles:
        if role in SCORERS:
            example.append(f"{role}.function=my_module:my_function")
        if role in ("teacher", "judge"):
            example.append(f"{role}.model.path=...")
    trains = config.algorithm.name not in QUESTIONS
    models, group = ", ".join(entry.roles), f"{entry.roles[0]}.train"
    if not trains:
        models = models.replace("generator", "generator (its settings: actor.*)")
        group = "actor.generation"
    again = "; started again, it goes on from its checkpoint" if trains else ""
    lines = [
        fill(f"{recipe.command}: {summary(entry)}", WIDTH),
        "",
        f"  {recipe.command} {' '.join(example)} name=value ...",
        "",
        f"models    {models}",
        (
            f"data      {entry.rows} in parquet, jsonl, json or csv files, or "
            "owner/name:config:split of the Hugging Face hub"
        ),
        f"results   output_dir={config.output_dir}{again}",
        "",
        "  --settings             every setting that this recipe reads, with default and meaning",
        f"  {f'--settings {group}':<22} only those whose name begins so",
        "  dry_run=true           check everything, say what would run where, and stop",
        "  runtime=local          all in this process, without Ray: breakpoints work",
        "  --cfg job              the settings as YAML",
        "",
        "Several recipes, rewards, pools, engines and algorithms of your own: docs/recipes.md",
    ]
    return "\n".join(lines)


def summary(entry: AlgorithmEntry) -> str:
    """The first paragraph of the algorithm's module, or of its config class where several recipes
    share the module."""
    sharing = [known for known in ENTRIES.values() if known.module == entry.module]
    text = import_module(entry.module).__doc__
    if len(sharing) > 1:
        text = entry.load_config().__doc__
    return " ".join((text or entry.algorithm).partition("\n\n")[0].split())


def recipe_list() -> str:
    lines = [
        "python -m recipes.NAME --help             how to use one of these",
        "python -m recipes path/to/mine.yaml ...   a recipe of your own (docs/recipes.md)",
        "",
    ]
    for name in packaged_recipes():
        text = f"recipes.{name:<30} {summary(algorithm_entry(name))}"
        lines.append(fill(text, WIDTH, subsequent_indent=" " * 39))
    return "\n".join(lines)
