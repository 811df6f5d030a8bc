"""TaskDataset: the rows that episodes begin with; what the policy sees of them is the environment's
business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.dataset import PromptDataset
from controllers.data.messages import MISSING, find_value
from controllers.data.rows import Encode
from controllers.data.sources import SourceRow
from controllers.data.tokenize import PromptTokenizer, extras
from controllers.data.writer import EncodedRow
from hybridflow.batch import SAMPLE, Batch
from workers.columns import EXTRAS, TASK, UID
from workers.images import ImageProcessor

BLIND = "environments show text alone; leave it out, or give it to the environment in a column"
PROMPT = "prompt"
"""The task's entry with the prompt, as text or messages; no column of the data is called so."""


class TaskDataset(PromptDataset):
    """Batches have task (the row's further columns, and `prompt` where the data has one), uid and
    extras. The answer is optional."""

    noun = "tasks"
    columns = (TASK.name, UID.name, EXTRAS.name, SAMPLE.name)

    @classmethod
    def encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> Encode:
        del images  # environments show text alone
        tokenize = PromptTokenizer(tokenizer, replace(config, images_column=None), blind=BLIND)

        def encode(rows: Sequence[SourceRow]) -> list[EncodedRow]:
            with_prompt = [row for row in rows if has(row, config.prompt_column)]
            tokens = iter(tokenize(with_prompt))
            encoded = []
            for row in rows:
                columns = extras(row, without_missing_answer(row, config))
                ids: list[int] = []
                if has(row, config.prompt_column):
                    ids, columns[PROMPT] = next(tokens), tokenize.prompt(row)
                encoded.append(EncodedRow(parts=(ids,), num_tokens=len(ids), columns=columns))
            return encoded

        return encode

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        batch = super().rows(index, uid)
        tasks = batch.objects(EXTRAS.name)
        columns = []
        for task in tasks:
            columns.append({name: value for name, value in task.items() if name != PROMPT})
        others = batch.drop("prompt_ids", EXTRAS.name)
        return others | Batch.of(task=tasks, extras=columns)


def has(row: SourceRow, column: str) -> bool:
    return find_value(row.values, column) is not MISSING


def without_missing_answer(row: SourceRow, config: DataConfig) -> DataConfig:
    """The settings without the answer's column where it has its default name and the row lacks it:
    an environment may know without it what is right."""
    if config.answer_column == "answer" and not has(row, "answer"):
        return replace(config, answer_column=None)
    return config
