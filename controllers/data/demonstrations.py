"""DemonstrationDataset: responses that a supervised model imitates, as prompt and response or
as whole conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.conversation import Answered, Conversation, ConversationTokenizer
from controllers.data.image_column import image_columns
from controllers.data.images import STORED
from controllers.data.messages import roots, value_of
from controllers.data.rows import Encode, RowDataset
from controllers.data.sources import SourceRow
from controllers.data.writer import EncodedRow
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from workers.columns import LOSS_MASK, NUM_TOKENS, PROMPT_IDS, RESPONSE_IDS, UID
from workers.images import ImageProcessor


class DemonstrationDataset(RowDataset):
    """Batches have prompt_ids (all before the assistant's first turn), response_ids (the rest),
    loss_mask, num_tokens, uid."""

    num_parts = 3
    length_limit = "max_tokens"
    noun = "demonstrations"
    columns = (PROMPT_IDS.name, RESPONSE_IDS.name, LOSS_MASK.name, NUM_TOKENS.name, UID.name)

    @classmethod
    def columns_read(cls, config: DataConfig, row: SourceRow) -> set[str]:
        names = {config.messages_column}
        if config.messages_column is None:
            names = {config.prompt_column, config.response_column}
        return roots({*names, config.tools_column, *image_columns(config)})

    @classmethod
    def encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> Encode:
        tokenize = ConversationTokenizer(tokenizer, config, images)

        def conversation(row: SourceRow) -> Conversation:
            if config.messages_column is not None:
                return tokenize.messages(row)
            response = value_of(
                row,
                config.response_column,
                "data.response_column (or data.messages_column for conversations)",
            )
            return tokenize.answer(row, config.response_column, response)

        def encode(rows: Sequence[SourceRow]) -> list[EncodedRow]:
            encoded = []
            for answered in tokenize([conversation(row) for row in rows]):
                parts = (answered.prompt, answered.response, answered.mask)
                num_tokens = len(answered.prompt) + len(answered.response)
                columns = stored_images(answered, images)
                encoded.append(
                    EncodedRow(
                        parts=parts,
                        num_tokens=num_tokens,
                        mask_length=len(answered.mask),
                        columns=columns,
                    )
                )
            return encoded

        return encode

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        row = self.checked(index)
        prompts, responses, masks = self.parts(row, 0), self.parts(row, 1), self.parts(row, 2)
        if uid is None:
            uid = row.copy()
        return Batch.of(
            prompt_ids=prompts,
            response_ids=responses,
            loss_mask=Ragged(masks.values.to(torch.bool), responses.lengths),
            num_tokens=prompts.lengths + responses.lengths,
            uid=uid,
            **self.images(row),
        )


def stored_images(answered: Answered, images: ImageProcessor | None) -> dict[str, Any]:
    """The plain value of a row's images, for a model that sees them."""
    return {} if images is None else {STORED: list(answered.images)}
