"""python -m recipes.generate model.path=... data.train=...

Answers every prompt algorithm.samples_per_prompt times and writes output_dir/responses.parquet:
prompt, response, the data's columns, token ids and, with algorithm.log_probs=true, their log-probs.
The file is data for recipes.sft (data.response_column=response).
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from controllers.evaluation import GenerateConfig
from hybridflow.progress_display import shown
from recipes.config import RunConfig
from recipes.evaluation_run import CONSOLE, answers, table, write
from recipes.main import recipe


def generate(config: RunConfig) -> Path | None:
    """The file; None where nothing was asked."""
    settings = cast(GenerateConfig, config.algorithm)
    tables = []
    with shown(CONSOLE, live=config.metrics.console):
        for batch, tokenizer in answers(config):
            tables.append(table(batch, tokenizer, log_probs=settings.log_probs))
    if not tables:
        return None
    path = Path(config.output_dir) / "responses.parquet"
    write(tables, path)
    CONSOLE.print(f"{sum(len(one) for one in tables)} responses: {path}", highlight=False)
    return path


if __name__ == "__main__":
    recipe("generate", generate)()
