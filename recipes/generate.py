"""python -m recipes.generate model.path=... data.train=...

Answers every prompt algorithm.samples_per_prompt times and writes output_dir/responses.parquet:
prompt, response, the data's columns, token ids and, with algorithm.log_probs=true, their log-probs.
The file is data for recipes.sft (data.response_column=response). Columns that parquet can't hold
are written as JSON text (response_files.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from controllers.evaluation import GenerateConfig
from hybridflow.progress_display import shown
from recipes.config import RunConfig
from recipes.evaluation_run import CONSOLE, answers
from recipes.main import recipe
from recipes.response_files import Responses


def generate(config: RunConfig) -> Path | None:
    """The file; None where nothing was asked."""
    settings = cast(GenerateConfig, config.algorithm)
    responses = None
    with shown(CONSOLE, live=config.metrics.console):
        for batch, prepared in answers(config):
            if responses is None:
                responses = Responses(
                    prepared.tokenizer,
                    log_probs=settings.log_probs,
                    end_token_ids=prepared.config.model.end_token_ids or (),
                )
            responses.add(batch)
    if responses is None:
        return None
    path = Path(config.output_dir) / "responses.parquet"
    responses.write(path)
    CONSOLE.print(f"{len(responses)} responses: {path}", highlight=False)
    return path


if __name__ == "__main__":
    recipe("generate", generate)()
