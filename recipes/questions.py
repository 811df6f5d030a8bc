"""check_question(): what recipes.evaluate and recipes.generate need beside a run's settings: samples that
differ, and files that can be written once every prompt is answered."""

from __future__ import annotations

import logging
from pathlib import Path

from recipes.config import RunConfig

LOGGER = logging.getLogger(__name__)
FILES = {
    "evaluate": ("evaluation.json", "samples.parquet", "pass_rates.jsonl", "samples.jsonl"),
    "generate": ("responses.parquet",),
}
"""Recipe -> the files that it leaves in output_dir."""


def check_question(config: RunConfig) -> None:
    """Says too which files of an earlier call are going to be replaced."""
    data = config.data
    if config.algorithm.name == "evaluate" and data.train != data.validation:
        raise ValueError(
            f"data.train is {data.train!r}, and recipes.evaluate answers data.validation="
            f"{data.validation!r}; leave data.train out, or name its rows in data.validation"
        )
    samples = config.algorithm.samples_per_prompt
    if samples > 1 and config.actor.generation.sampling.greedy:
        raise ValueError(
            f"algorithm.samples_per_prompt is {samples} with "
            "actor.generation.sampling.greedy=true: all samples would be the same; set "
            "actor.generation.sampling.greedy=false, and a temperature"
        )
    output = Path(config.output_dir)
    existing = [output / name for name in FILES[config.algorithm.name] if (output / name).exists()]
    for path in existing:
        if not path.is_file():
            raise ValueError(
                f"output_dir is {config.output_dir!r}, where {path.name} is no file and would be one; "
                "choose another directory"
            )
    if existing:
        LOGGER.warning("%s: replaced once all prompts are answered", ", ".join(map(str, existing)))
