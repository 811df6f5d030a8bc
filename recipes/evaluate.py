"""python -m recipes.evaluate model.path=... data.validation=... reward.function=package.module:name

Answers every prompt (greedily, or algorithm.samples_per_prompt times with
actor.generation.sampling.greedy=false), scores the answers with any reward, and leaves in
output_dir:

    evaluation.json     the numbers
    samples.parquet     every answer with its reward and the data's columns (response_files.py)
    pass_rates.jsonl    one line a prompt: {"row": 2, "place": "test.jsonl, line 3", "samples": 8,
                        "passed": 6, "pass_rate": 0.75, "mean_reward": 0.8}, where `row` counts the
                        rows that were read from 0 and `place` is where the row stands, as in
                        messages
    samples.jsonl       metrics.samples.validation of the answers

Prints a table and one of the answers.
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
from hybridflow.whole_file import whole_file
from recipes.config import RunConfig
from recipes.evaluation_run import CONSOLE, answers
from recipes.main import recipe
from recipes.response_files import Responses, pass_rates, write_lines
from workers.agents.outcome import FAILED


def evaluate(config: RunConfig) -> dict[str, float] | None:
    """The numbers of evaluation.json; None where nothing was asked."""
    settings = cast(EvaluateConfig, config.algorithm)
    batches = []
    responses = None
    with shown(CONSOLE, live=config.metrics.console):
        for batch, prepared in answers(config):
            if responses is None:
                responses = Responses(
                    prepared.tokenizer,
                    log_probs=False,
                    end_token_ids=prepared.config.model.end_token_ids or (),
                )
            batches.append(batch)
            responses.add(batch)
    if responses is None:
        return None
    numbers = dict(measure(batches, settings))
    output = Path(config.output_dir)
    responses.write(output / "samples.parquet")
    counted = [row for row in responses.rows if row["finish_reason"] != FAILED]
    rates = pass_rates(counted, settings.success_reward, prepared.train.place)
    write_lines(output / "pass_rates.jsonl", rates)
    result = {"model": config.model.path, "data": config.data.train, **numbers}
    with whole_file(output / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    reader = SampleReader(
        config.metrics.samples,
        prepared.tokenizer,
        seed=config.seed,
        end_token_ids=prepared.config.model.end_token_ids or (),
    )
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
    files = ", ".join(
        str(output / name) for name in ("evaluation.json", "samples.parquet", "pass_rates.jsonl")
    )
    console.print(files, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    recipe("evaluate", evaluate)()
