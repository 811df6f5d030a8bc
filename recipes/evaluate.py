"""python -m recipes.evaluate model.path=... data.validation=... reward.function=package.module:name

Answers every prompt (greedily, or algorithm.samples_per_prompt times with
actor.generation.sampling.greedy=false), scores the answers with any reward, and leaves in
output_dir: evaluation.json, samples.parquet (every answer) and samples.jsonl
(metrics.samples.validation of them). Prints a table and one of the answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from controllers.evaluation import EvaluateConfig, measure
from controllers.samples import SampleReader
from hybridflow.batch import Batch
from hybridflow.metrics.console import print_sample
from hybridflow.metrics.jsonl import replace_samples
from hybridflow.metrics.samples import Sample, SampleRows
from hybridflow.progress_display import shown
from hybridflow.results import Metrics
from recipes.config import RunConfig
from recipes.evaluation_run import CONSOLE, answers, table, write
from recipes.main import recipe


def evaluate(config: RunConfig) -> dict[str, float] | None:
    """The numbers of evaluation.json; None where nothing was asked."""
    settings = cast(EvaluateConfig, config.algorithm)
    batches, tables = [], []
    with shown(CONSOLE, live=config.metrics.console):
        for batch, tokenizer in answers(config):
            batches.append(batch)
            tables.append(table(batch, tokenizer, log_probs=False))
    if not batches:
        return None
    numbers = dict(measure(batches, settings))
    output = Path(config.output_dir)
    write(tables, output / "samples.parquet")
    (output / "evaluation.json").write_text(
        json.dumps({"model": config.model.path, "data": config.data.train, **numbers}, indent=1)
        + "\n"
    )
    reader = SampleReader(config.metrics.samples, tokenizer, seed=config.seed)
    samples = reader.validation(Metrics(rows=Batch.concat(batches)))
    rows = SampleRows(step=0, split="evaluation", time_s=time.time(), samples=samples)
    replace_samples(output / "samples.jsonl", rows)
    show(numbers, samples, output)
    return numbers


def show(numbers: dict[str, float], samples: Sequence[Sample], output: Path) -> None:
    lines = Table(title="evaluation", show_header=False)
    for name, value in numbers.items():
        lines.add_row(name, f"{value:.4g}")
    console = Console()
    if samples:
        print_sample(console, samples[0], "sample")
    console.print(lines)
    console.print(f"{output}/evaluation.json, {output}/samples.parquet", highlight=False)


if __name__ == "__main__":
    recipe("evaluate", evaluate)()
