"""python -m recipes.evaluate model.path=... data.validation=... reward.function=package.module:name

Answers every prompt (greedily, or algorithm.samples_per_prompt times with
actor.generation.sampling.greedy=false), scores the answers with any reward, and leaves in output_dir:
evaluation.json and samples.parquet. Prints a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from controllers.evaluation import EvaluateConfig, measure
from recipes.config import RunConfig
from recipes.evaluation_run import answers, table, write
from recipes.main import recipe


def evaluate(config: RunConfig) -> dict[str, float] | None:
    """The numbers of evaluation.json; None where nothing was asked."""
    settings = cast(EvaluateConfig, config.algorithm)
    batches, tables = [], []
    for batch, tokenizer in answers(config):
        batches.append(batch)
        tables.append(table(batch, tokenizer, log_probs=False))
    if not batches:
        return None
    numbers = dict(measure(batches, settings))
    output = Path(config.output_dir)
    write(tables, output / "samples.parquet")
    (output / "evaluation.json").write_text(
        json.dumps({"model": config.model.path, "data": config.data.train, **numbers}, indent=1) + "\n"
    )
    show(numbers, output)
    return numbers


def show(numbers: dict[str, float], output: Path) -> None:
    shown = Table(title="evaluation", show_header=False)
    for name, value in numbers.items():
        shown.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(shown)
    console.print(f"{output}/evaluation.json, {output}/samples.parquet", highlight=False)


if __name__ == "__main__":
    recipe("evaluate", evaluate)()
