"""PromptDataset: prompts as tokens, read and tokenised once, kept in memory-mapped files without names.

Tokens are one flat int32 array, a row's further columns are JSON (so that what comes out is what went in, without the nulls and
widened types of a common schema). Leaves out a cache between runs: a fast tokenizer does a million prompts in about a minute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig, Overlong, places
from controllers.data.sources import READ_ROWS, SourceRow, read
from controllers.data.tokenize import PromptTokenizer, extras

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """PromptBatch(prompt_ids=[array([5, 6]), array([7])], uid=array([12, 3]), row=array([2, 3]), extras={"answer": ["a", "b"]})"""

    prompt_ids: list[np.ndarray]
    """int64 [tokens] of each row."""
    uid: np.ndarray
    """int64 [rows]: row + epoch * rows of the dataset; no two uses of a prompt share it."""
    row: np.ndarray
    """int64 [rows]: the row's number in the dataset (after the length filter)."""
    extras: dict[str, list[Any]]
    """Column -> one plain Python value a row; null where a row of a jsonl file does not have it."""

    def __len__(self) -> int:
        return len(self.prompt_ids)


class PromptDataset:
    """dataset = PromptDataset.load(config, config.train, tokenizer); dataset.rows([3, 0]); dataset.all()"""

    def __init__(self, tokens: np.ndarray, token_ends: np.ndarray, extras: np.ndarray, extras_ends: np.ndarray, fingerprint: str) -> None:
        self._tokens, self._token_ends, self._extras, self._extras_ends = tokens, token_ends, extras, extras_ends
        self.fingerprint = fingerprint
        """Of tokens and columns of all rows, in order."""

    @classmethod
    def load(cls, config: DataConfig, where: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
        """Reads, checks and tokenises everything; a broken row is a ValueError with its file and line."""
        with tempfile.TemporaryFile() as tokens, tempfile.TemporaryFile() as columns:
            writer = _Writer(tokens, columns, config)
            prompt_tokenizer = PromptTokenizer(tokenizer, config)
            for rows in _chunks(read(places("data", where))):
                for row, ids in zip(rows, prompt_tokenizer(rows), strict=True):
                    writer.add(row, ids)
            return writer.finish(where)

    @classmethod
    def load_text(cls, config: DataConfig, where: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
        """Plain text without further columns, longer ones cut into pieces (data.pretraining, data.pretraining_column, ...)."""
        text = replace(
            config,
            prompt_column=config.pretraining_column,
            answer_column=None,
            columns=[],
            batch_size=config.pretraining_batch_size,
            max_prompt_tokens=2**31 - 1,
            text_as_user_message=False,
        )
        return cls.load(text, where, tokenizer).cut(config.pretraining_tokens)

    def cut(self, max_tokens: int) -> PromptDataset:
        """Every row in the fewest pieces of at most max_tokens (4 or more) tokens, about equal ones; a row of one token predicts nothing
        and is left out, with a warning."""
        lengths = np.diff(self._token_ends, prepend=0)
        if (short := int((lengths < 2).sum())) == len(lengths):
            raise ValueError("data.pretraining: no text has two tokens or more; give longer ones")
        if short:
            LOGGER.warning("data.pretraining: left out %d texts of one token", short)
        pieces = [np.arange(n) * length // n for length in lengths for n in (-(-int(length) // max_tokens),)]
        starts = np.concatenate([end - length + piece for end, length, piece in zip(self._token_ends, lengths, pieces, strict=True)])
        ends = np.append(starts[1:], self._token_ends[-1])
        long = ends - starts > 1
        tokens = np.concatenate([self._tokens[start:end] for start, end in zip(starts[long], ends[long], strict=True)])
        nothing = np.frombuffer(b"{}" * int(long.sum()), dtype=np.uint8)
        fingerprint = f"{self.fingerprint} cut at {max_tokens}"
        return PromptDataset(tokens, np.cumsum((ends - starts)[long]), nothing, 2 * np.arange(1, int(long.sum()) + 1), fingerprint)

    def __len__(self) -> int:
        return len(self._token_ends)

    @property
    def num_tokens(self) -> int:
        return int(self._token_ends[-1])

    @property
    def longest_prompt_tokens(self) -> int:
        return int(self.lengths.max())

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of every prompt."""
        return np.diff(self._token_ends, prepend=0)

    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> PromptBatch:
        """The given rows in the given order; `uid` is the row's number where it is not given."""
        row = np.asarray(index, dtype=np.int64)
        if len(row) and not (row.min() >= 0 and row.max() < len(self)):
            raise ValueError(f"data: rows {row.min()} to {row.max()} asked for; the dataset has 0 to {len(self) - 1}")
        values = [json.loads(_cut(self._extras, self._extras_ends, i).tobytes()) for i in row]
        names = dict.fromkeys(name for columns in values for name in columns)
        return PromptBatch(
            prompt_ids=[_cut(self._tokens, self._token_ends, i).astype(np.int64) for i in row],
            uid=row.copy() if uid is None else uid,
            row=row,
            extras={name: [columns.get(name) for columns in values] for name in names},
        )

    def all(self) -> PromptBatch:
        """Every row once, in order (validation)."""
        return self.rows(np.arange(len(self)))


class _Writer:
    """Appends rows to two open files and maps them at the end."""

    def __init__(self, tokens: Any, columns: Any, config: DataConfig) -> None:
        self.tokens, self.columns = cast(BinaryIO, tokens), cast(BinaryIO, columns)
        self.config = config
        self.hash = hashlib.sha256()
        self.token_ends: list[int] = []
        self.columns_ends: list[int] = []
        self.num_overlong, self.longest = 0, 0

    def add(self, row: SourceRow, ids: list[int]) -> None:
        columns = _encode(row, extras(row, self.config))
        if not ids:
            raise ValueError(f"{row.place}: the prompt has no tokens; remove the row")
        if len(ids) > self.config.max_prompt_tokens:
            if self.config.overlong is Overlong.error:
                raise ValueError(
                    f"{row.place}: the prompt has {len(ids)} tokens, over data.max_prompt_tokens={self.config.max_prompt_tokens}; "
                    "raise it, or set data.overlong=drop"
                )
            self.num_overlong, self.longest = self.num_overlong + 1, max(self.longest, len(ids))
            return
        data = np.asarray(ids, dtype=np.int32).tobytes()
        for file, ends, part, width in ((self.tokens, self.token_ends, data, 4), (self.columns, self.columns_ends, columns, 1)):
            file.write(part)
            ends.append((ends[-1] if ends else 0) + len(part) // width)
            self.hash.update(len(part).to_bytes(8, "little"))
            self.hash.update(part)

    def finish(self, where: object) -> PromptDataset:
        limit = self.config.max_prompt_tokens
        if not self.token_ends:
            dropped = f"; all {self.num_overlong} prompts are over data.max_prompt_tokens={limit}, raise it" if self.num_overlong else ""
            raise ValueError(f"data {where!r} has no rows{dropped}")
        if self.num_overlong:
            LOGGER.warning(
                "data %s: dropped %d of %d prompts with more than data.max_prompt_tokens=%d tokens (the longest has %d)",
                where,
                self.num_overlong,
                self.num_overlong + len(self.token_ends),
                limit,
                self.longest,
            )
        self.tokens.flush()
        self.columns.flush()
        dataset = PromptDataset(
            np.memmap(self.tokens, dtype=np.int32, mode="r"),
            np.asarray(self.token_ends, dtype=np.int64),
            np.memmap(self.columns, dtype=np.uint8, mode="r"),
            np.asarray(self.columns_ends, dtype=np.int64),
            self.hash.hexdigest(),
        )
        LOGGER.info("data %s: %d prompts, %.1f tokens each on average", where, len(dataset), dataset.num_tokens / len(dataset))
        return dataset


def _encode(row: SourceRow, columns: dict[str, Any]) -> bytes:
    try:
        return json.dumps(columns).encode()
    except (TypeError, ValueError) as error:
        wrong = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in columns.items() if not _is_plain(value))
        raise ValueError(
            f"{row.place}: columns that hold no plain values (text, numbers, lists, dicts): {wrong}; "
            "store them as text, or list in data.columns the columns to keep"
        ) from error


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _chunks(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while chunk := list(islice(rows, READ_ROWS)):
        yield chunk


def _cut(values: np.ndarray, ends: np.ndarray, row: int) -> np.ndarray:
    return values[ends[row - 1] if row else 0 : ends[row]]
