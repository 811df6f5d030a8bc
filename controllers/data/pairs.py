"""PairDataset: two responses to one prompt, of which the first is preferred; SafetyPairDataset:
each also judged safe or not.

A pair is two rows of a batch, chosen and rejected one after the other, which the column `pair`
keeps on one rank and in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.conversation import Answered, Conversation, ConversationTokenizer
from controllers.data.demonstrations import stored_images
from controllers.data.image_column import image_columns
from controllers.data.messages import MISSING, find_value, roots, value_of
from controllers.data.pair_layouts import Unusable, with_prompt
from controllers.data.rows import Encode, RowDataset
from controllers.data.sources import SourceRow
from controllers.data.writer import EncodedRow
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from workers.columns import CHOSEN, HARM_SIGN, NUM_TOKENS, PAIR, PROMPT_IDS, RESPONSE_IDS, UID
from workers.images import ImageProcessor


class PairDataset(RowDataset):
    """Batches have two rows a pair: prompt_ids, response_ids, num_tokens, chosen, pair and uid
    (the pair's number, as uid of prompts)."""

    num_parts = 3
    length_limit = "max_tokens"
    noun = "pairs"
    columns: ClassVar[tuple[str, ...]] = (
        PROMPT_IDS.name,
        RESPONSE_IDS.name,
        NUM_TOKENS.name,
        CHOSEN.name,
        PAIR.name,
        UID.name,
    )

    @classmethod
    def encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> Encode:
        tokenize = ConversationTokenizer(tokenizer, config, images)

        def responses(row: SourceRow) -> list[Conversation]:
            columns = (config.chosen_column, config.rejected_column)
            if all(find_value(row.values, column) is MISSING for column in columns):
                raise ValueError(
                    f"{row.place}: neither a column {columns[0]!r} nor {columns[1]!r}, it has "
                    f"{', '.join(map(repr, row.values))}; set data.chosen_column and "
                    "data.rejected_column, or make pairs of ranked, rated or labelled responses first"
                )
            row = with_prompt(row, config, chat=tokenize.has_template)
            chosen = value_of(row, config.chosen_column, "data.chosen_column")
            rejected = value_of(row, config.rejected_column, "data.rejected_column")
            return [
                tokenize.answer(row, config.chosen_column, chosen),
                tokenize.answer(row, config.rejected_column, rejected),
            ]

        def encode_pair(row: SourceRow, chosen: Answered, rejected: Answered) -> EncodedRow:
            equal = ""
            if chosen.response == rejected.response:
                columns = f"{config.chosen_column!r} and {config.rejected_column!r}"
                equal = f"the same response in {columns}"
            longest = len(chosen.prompt) + max(len(chosen.response), len(rejected.response))
            parts = (chosen.prompt, chosen.response, rejected.response)
            labels = cls.labels(row, config) | stored_images(chosen, images)
            return EncodedRow(parts=parts, num_tokens=longest, columns=labels, unusable=equal)

        def encode(rows: Sequence[SourceRow]) -> list[EncodedRow]:
            conversations: list[Conversation] = []
            unusable: dict[int, str] = {}
            for number, row in enumerate(rows):
                try:
                    conversations += responses(row)
                except Unusable as problem:
                    unusable[number] = str(problem)
            answered = iter(tokenize(conversations))
            encoded = []
            for number, row in enumerate(rows):
                if number in unusable:
                    reason = unusable[number]
                    encoded.append(EncodedRow(parts=(), num_tokens=0, columns={}, unusable=reason))
                else:
                    encoded.append(encode_pair(row, next(answered), next(answered)))
            return encoded

        return encode

    @classmethod
    def columns_read(cls, config: DataConfig, row: SourceRow) -> set[str]:
        pair = {config.prompt_column, config.chosen_column, config.rejected_column}
        return roots({*pair, config.tools_column, *image_columns(config)})

    @classmethod
    def labels(cls, row: SourceRow, config: DataConfig) -> dict[str, Any]:
        """Plain values of the pair that its batches need."""
        return {}

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        row = self.checked(index)
        if uid is None:
            uid = row
        uid = np.repeat(uid, 2)
        prompts = self.parts(np.repeat(row, 2), 0)
        responses = []
        for i in row:
            responses += [self.part(i, 1), self.part(i, 2)]
        response_ids = Ragged.of(responses)
        return Batch.of(
            prompt_ids=prompts,
            response_ids=response_ids,
            num_tokens=prompts.lengths + response_ids.lengths,
            chosen=torch.tensor([True, False] * len(row)),
            pair=uid,
            uid=uid.copy(),
            **self.images(np.repeat(row, 2)),
        )


class SafetyPairDataset(PairDataset):
    """Also harm_sign: +1 for an unsafe response, -1 for a safe one."""

    columns = (*PairDataset.columns, HARM_SIGN.name)

    @classmethod
    def columns_read(cls, config: DataConfig, row: SourceRow) -> set[str]:
        labels = {config.chosen_safe_column, config.rejected_safe_column}
        return super().columns_read(config, row) | roots(labels)

    @classmethod
    def labels(cls, row: SourceRow, config: DataConfig) -> dict[str, Any]:
        return {
            "chosen_safe": _flag(row, config.chosen_safe_column, "data.chosen_safe_column"),
            "rejected_safe": _flag(row, config.rejected_safe_column, "data.rejected_safe_column"),
        }

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        safe: list[bool] = []
        for i in self.checked(index):
            label = self.column_values(i)
            safe += [label["chosen_safe"], label["rejected_safe"]]
        return super().rows(index, uid) | Batch.of(
            harm_sign=1.0 - 2.0 * torch.tensor(safe, dtype=torch.float32)
        )


def _flag(row: SourceRow, column: str, setting: str) -> bool:
    value = value_of(row, column, setting)
    if isinstance(value, str):  # a .csv holds texts
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"{row.place}: {column!r} is {value!r}; it must be true (safe) or false")
    return bool(value)
