"""PromptDataset: the prompts that a policy answers, with the columns that its reward reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.images import STORED, images_of
from controllers.data.rows import Encode, RowDataset
from controllers.data.sources import SourceRow
from controllers.data.tokenize import PromptTokenizer, extras
from controllers.data.writer import EncodedRow
from hybridflow.batch import SAMPLE, Batch
from workers.columns import EXTRAS, PROMPT_IDS, UID
from workers.images import ImageProcessor

LOGGER = logging.getLogger(__name__)


class PromptDataset(RowDataset):
    """Batches have prompt_ids, uid (row + epoch * rows of the dataset: no two uses of a prompt
    share it) and extras."""

    num_parts = 1
    length_limit = "max_prompt_tokens"
    noun = "prompts"
    answered = True
    columns = (PROMPT_IDS.name, UID.name, EXTRAS.name, SAMPLE.name)

    @classmethod
    def encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> Encode:
        tokenize = PromptTokenizer(tokenizer, config, images)

        def encode(rows: Sequence[SourceRow]) -> list[EncodedRow]:
            prompts = [tokenize.prompt(row) for row in rows]
            encoded = []
            for row, prompt, ids in zip(rows, prompts, tokenize.tokens(rows, prompts), strict=True):
                if not ids:
                    raise ValueError(f"{row.place}: the prompt has no tokens; remove the row")
                columns = extras(row, config, sees_images=images is not None)
                if images is not None:
                    columns[STORED] = [] if isinstance(prompt, str) else images_of(prompt)
                encoded.append(EncodedRow(parts=(ids,), num_tokens=len(ids), columns=columns))
            return encoded

        return encode

    @classmethod
    def load_text(
        cls,
        config: DataConfig,
        where: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: tuple[str, int] | None = None,
    ) -> PromptDataset:
        """Plain text without further columns, longer ones cut into pieces (data.pretraining,
        data.pretraining_column, ...)."""
        text = replace(
            config,
            prompt_column=config.pretraining_column,
            answer_column=None,
            columns=[],
            batch_size=config.pretraining_batch_size,
            max_prompt_tokens=2**31 - 1,
            text_as_user_message=False,
            images_column=None,
        )
        rows = cls.load(text, where, tokenizer, field="data.pretraining", vocabulary=vocabulary)
        return rows.cut(config.pretraining_tokens)

    def cut(self, max_tokens: int) -> PromptDataset:
        """Every row in the fewest pieces of at most max_tokens (4 or more) tokens, about equal
        ones; a row of one token predicts nothing and is left out, with a warning."""
        lengths = np.diff(self._token_ends, prepend=0)
        if (short := int((lengths < 2).sum())) == len(lengths):
            raise ValueError("data.pretraining: no text has two tokens or more; give longer ones")
        if short:
            LOGGER.warning("data.pretraining: left out %d texts of one token", short)
        row_starts = self._token_ends - lengths
        pieces = []
        for start, length in zip(row_starts, lengths, strict=True):
            num_pieces = math.ceil(length / max_tokens)
            pieces.append(start + np.arange(num_pieces) * length // num_pieces)
        starts = np.concatenate(pieces)
        ends = np.append(starts[1:], self._token_ends[-1])
        long = ends - starts > 1
        starts, ends = starts[long], ends[long]
        tokens = [self._tokens[start:end] for start, end in zip(starts, ends, strict=True)]
        cut = PromptDataset(
            np.concatenate(tokens),
            token_ends=np.cumsum(ends - starts),
            extras=np.frombuffer(b"{}" * len(starts), dtype=np.uint8),
            extras_ends=2 * np.arange(1, len(starts) + 1),
            fingerprint=f"{self.fingerprint} cut at {max_tokens}",
        )
        # Each source's pieces, by the row that they begin in.
        row_of_piece = np.searchsorted(row_starts, starts, side="right") - 1
        first = 0
        for share in self.shares:
            last = first + share.num_rows
            inside = (row_of_piece >= first) & (row_of_piece < last)
            cut.shares = [*cut.shares, replace(share, num_rows=int(inside.sum()))]
            first = last
        return cut

    @property
    def longest_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max())

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: the number of tokens of every prompt."""
        return np.diff(self._token_ends, prepend=0)

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        row = self.checked(index)
        values = [self.column_values(i) for i in row]
        # A row of a jsonl file that lacks a column has null there, so that a reward function always
        # gets all of its parameters.
        missing: dict[str, Any] = {}
        for columns in values:
            missing |= dict.fromkeys(columns)
        if uid is None:
            uid = row.copy()
        return Batch.of(
            prompt_ids=self.parts(row, 0),
            uid=uid,
            extras=[missing | columns for columns in values],
            **self.images(row),
        )
