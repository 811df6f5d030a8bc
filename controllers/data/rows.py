"""RowDataset: rows of tokens and columns, read and tokenised once, kept in memory-mapped files
without names.

A row is a fixed number of token sequences (a prompt; a prompt and its response; a prompt and two
responses) and a dict of plain values. Tokens are one flat int32 array; columns are JSON, so that
what comes out is what went in, without the nulls and widened types of a common schema. Leaves out
what rows mean (dataset.py, demonstrations.py, pairs.py) and a cache between runs: a fast tokenizer
does a million prompts in about a minute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, ClassVar, Self, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig, Overlong, places
from controllers.data.sources import READ_ROWS, SourceRow, read
from hybridflow.batch import Batch
from hybridflow.columns import Ragged

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """EncodedRow(parts=([5, 6], [7, 1]), num_tokens=4, columns={"answer": "7"})"""

    parts: Sequence[Sequence[int]]
    """The row's token sequences (or other integers, such as a mask)."""
    num_tokens: int
    """The length that is compared with the limit."""
    columns: dict[str, Any]


class VocabularyCheck:
    """Refuses a row with a token that the model does not know, before anything starts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: tuple[str, int] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.role, self.size = vocabulary or ("", 2**31)

    def __call__(self, row: SourceRow, encoded: EncodedRow) -> None:
        for part in encoded.parts:
            highest = max(part, default=0)
            if highest >= self.size:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                raise ValueError(
                    f"{row.place}: token {highest} ({token!r}) is outside the vocabulary of "
                    f"{self.role}'s model, which has {self.size} tokens; the tokenizer has "
                    f"{len(self.tokenizer)}: use the model's own tokenizer, or resize the model's "
                    "embeddings to it"
                )


Encode = Callable[[Sequence[SourceRow]], list[EncodedRow]]


class RowDataset(ABC):
    """dataset = PromptDataset.load(config, config.train, tokenizer); dataset.rows([3, 0]);
    dataset.all()"""

    num_parts: ClassVar[int]
    """Token sequences of a row."""
    length_limit: ClassVar[str]
    """The setting of DataConfig that limits a row's tokens."""
    noun: ClassVar[str]
    """The word for rows in messages."""
    columns: ClassVar[tuple[str, ...]]
    """The columns of its batches, which every step of an algorithm begins with."""

    def __init__(
        self,
        tokens: np.ndarray,
        token_ends: np.ndarray,
        extras: np.ndarray,
        extras_ends: np.ndarray,
        fingerprint: str,
    ) -> None:
        self._tokens, self._token_ends = tokens, token_ends
        self._extras, self._extras_ends = extras, extras_ends
        self.fingerprint = fingerprint
        """Digest of the tokens and columns of all rows, in order."""
        self._places: Sequence[str] = ()

    @classmethod
    @abstractmethod
    def encoder(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encode:
        """A function that turns rows of a file into tokens; it raises ValueError with the place
        of a broken row."""

    @abstractmethod
    def rows(self, index: Sequence[int] | np.ndarray, uid: np.ndarray | None = None) -> Batch:
        """The given rows in the given order; `uid` (int64) is the row's number where it is not
        given."""

    @classmethod
    def load(
        cls,
        config: DataConfig,
        where: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        field: str = "data.train",
        vocabulary: tuple[str, int] | None = None,
    ) -> Self:
        """Reads, checks and tokenises everything. `field`: the setting that says where;
        `vocabulary`: a role and the number of tokens that its model knows, which no row may go
        over."""
        with tempfile.TemporaryFile() as tokens, tempfile.TemporaryFile() as columns:
            writer = _Writer(tokens, columns, config, cls.length_limit, cls.noun)
            check = VocabularyCheck(tokenizer, vocabulary)
            encode = cls.encoder(tokenizer, config)
            for rows in _chunks(read(places("data", where))):
                for row, encoded in zip(rows, encode(rows), strict=True):
                    check(row, encoded)
                    writer.add(row, encoded)
            dataset = cls(*writer.finish(where))
            dataset._places = writer.places
        LOGGER.info(
            "data %s: %d %s, %.1f tokens each on average",
            where,
            len(dataset),
            cls.noun,
            dataset.num_tokens / len(dataset),
        )
        return dataset

    def __len__(self) -> int:
        return len(self._token_ends) // self.num_parts

    def place(self, row: int) -> str:
        """Where the row stands, as in messages: "train.jsonl, line 3"; empty for rows that were
        not read from a file."""
        return self._places[row] if self._places else ""

    @property
    def num_tokens(self) -> int:
        return int(self._token_ends[-1])

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row: its first part with the longest of the others (a prompt
        with its response, or with the longer one of two)."""
        lengths = np.diff(self._token_ends, prepend=0).reshape(-1, self.num_parts)
        return int((lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)).max())

    def all(self) -> Batch:
        """Every row once, in order (validation)."""
        return self.rows(np.arange(len(self)))

    def checked(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 row numbers that exist."""
        row = np.asarray(index, dtype=np.int64)
        if len(row) and not (row.min() >= 0 and row.max() < len(self)):
            raise ValueError(
                f"data: rows {row.min()} to {row.max()} asked for; the dataset has 0 to "
                f"{len(self) - 1}"
            )
        return row

    def part(self, row: int, number: int) -> np.ndarray:
        """int64 [tokens]: one token sequence of a row."""
        return _cut(self._tokens, self._token_ends, row * self.num_parts + number).astype(np.int64)

    def parts(self, rows: np.ndarray, number: int) -> Ragged:
        """int64 [rows, tokens]: the token sequence of that number of each row."""
        return Ragged.of([self.part(row, number) for row in rows])

    def column_values(self, row: int) -> dict[str, Any]:
        """The row's plain values."""
        values: dict[str, Any] = json.loads(_cut(self._extras, self._extras_ends, row).tobytes())
        return values

    @property
    def column_names(self) -> set[str]:
        """Names of the plain values that any row has."""
        names: set[str] = set()
        for row in range(len(self)):
            names.update(self.column_values(row))
        return names


class _Writer:
    """Appends rows to two open files and maps them at the end."""

    def __init__(
        self, tokens: Any, columns: Any, config: DataConfig, length_limit: str, noun: str
    ) -> None:
        self.tokens, self.columns = cast(BinaryIO, tokens), cast(BinaryIO, columns)
        self.limit_name, self.limit = length_limit, vars(config)[length_limit]
        self.overlong, self.noun = config.overlong, noun
        self.hash = hashlib.sha256()
        self.places: list[str] = []
        self.token_ends: list[int] = []
        self.columns_ends: list[int] = []
        self.num_rows, self.num_overlong, self.longest = 0, 0, 0

    def add(self, row: SourceRow, encoded: EncodedRow) -> None:
        columns = _encode(row, encoded.columns)
        if encoded.num_tokens > self.limit:
            if self.overlong is Overlong.error:
                raise ValueError(
                    f"{row.place}: {encoded.num_tokens} tokens, over "
                    f"data.{self.limit_name}={self.limit}; raise it, or set data.overlong=drop"
                )
            self.num_overlong += 1
            self.longest = max(self.longest, encoded.num_tokens)
            return
        self.num_rows += 1
        self.places.append(row.place)
        for part in encoded.parts:
            self._append(
                self.tokens, self.token_ends, np.asarray(part, dtype=np.int32).tobytes(), 4
            )
        self._append(self.columns, self.columns_ends, columns, 1)

    def _append(self, file: BinaryIO, ends: list[int], data: bytes, width: int) -> None:
        start = 0
        if ends:
            start = ends[-1]
        file.write(data)
        ends.append(start + len(data) // width)
        self.hash.update(len(data).to_bytes(8, "little"))
        self.hash.update(data)

    def finish(self, where: object) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
        if not self.num_rows:
            fix = "give a file that has some"
            if self.num_overlong:
                limit = f"data.{self.limit_name}={self.limit}"
                fix = f"all {self.num_overlong} {self.noun} are over {limit}, raise it"
            raise ValueError(f"data {where!r} has no rows; {fix}")
        if self.num_overlong:
            LOGGER.warning(
                (
                    "data %s: dropped %d of %d %s with more than data.%s=%d tokens (the longest "
                    "has %d)"
                ),
                where,
                self.num_overlong,
                self.num_overlong + self.num_rows,
                self.noun,
                self.limit_name,
                self.limit,
                self.longest,
            )
        self.tokens.flush()
        self.columns.flush()
        return (
            np.memmap(self.tokens, dtype=np.int32, mode="r"),
            np.asarray(self.token_ends, dtype=np.int64),
            np.memmap(self.columns, dtype=np.uint8, mode="r"),
            np.asarray(self.columns_ends, dtype=np.int64),
            self.hash.hexdigest(),
        )


def _encode(row: SourceRow, columns: dict[str, Any]) -> bytes:
    try:
        return json.dumps(columns).encode()
    except (TypeError, ValueError) as error:
        wrong = ", ".join(
            f"{name!r} ({type(value).__name__})"
            for name, value in columns.items()
            if not _is_plain(value)
        )
        raise ValueError(
            f"{row.place}: columns that hold no plain values (text, numbers, lists, dicts): "
            f"{wrong}; store them as text, or list in data.columns the columns to keep"
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
    start = 0
    if row:
        start = ends[row - 1]
    return values[start : ends[row]]
