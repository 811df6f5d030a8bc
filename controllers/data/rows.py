"""RowDataset: rows of tokens and columns, read and tokenised once, kept in memory-mapped files
without names.

A row is a fixed number of token sequences (a prompt; a prompt and its response; a prompt and two
responses) and a dict of plain values. Tokens are one flat int32 array; columns are JSON, so that
what comes out is what went in, without the nulls and widened types of a common schema. Leaves out
what rows mean (dataset.py, demonstrations.py, pairs.py) and a cache between runs: a fast tokenizer
does a million prompts in about a minute.
"""

from __future__ import annotations

import json
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.image_column import NamedColumn
from controllers.data.images import STORED, reference_of
from controllers.data.pass_rates import PassRates
from controllers.data.sources import READ_ROWS, SourceRow, read, sources
from controllers.data.writer import EncodedRow, RowWriter, Share, VocabularyCheck, Written
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from workers.columns import IMAGES
from workers.images import ImageProcessor, ImageReference

LOGGER = logging.getLogger(__name__)


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
    answered: ClassVar[bool] = False
    """Whether a policy answers the rows, so that they have a pass rate."""
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
        self.shares: Sequence[Share] = ()
        """The sources where they have weights, one after the other."""

    @classmethod
    @abstractmethod
    def encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> Encode:
        """A function that turns rows of a file into tokens; it raises ValueError with the place
        of a broken row. `images`: of a model that sees them."""

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
        images: ImageProcessor | None = None,
    ) -> Self:
        """Reads, checks and tokenises everything. `field`: the setting that says where;
        `vocabulary`: a role and the number of tokens that its model knows, which no row may go
        over; `images`: of a model that sees them."""
        rates = cls.pass_rates(config, field)
        with tempfile.TemporaryFile() as tokens, tempfile.TemporaryFile() as columns:
            writer = RowWriter(tokens, columns, config, cls.length_limit, cls.noun, rates)
            writer.check = VocabularyCheck(tokenizer, vocabulary)
            encode = cls.encoder(tokenizer, config, images)
            unread: dict[str, None] = {}
            columns_set = [NamedColumn(kind, config, field) for kind in ("images", "tools")]
            for source in sources(field, where):
                writer.begin(source)
                for rows in _chunks(read(source.place, field)):
                    for column in columns_set:
                        column.look_at(rows)
                    for row, encoded in zip(rows, encode(rows), strict=True):
                        writer.add(row, encoded)
                        unread |= dict.fromkeys(row.values.keys() - cls.columns_read(config, row))
            if unread:
                LOGGER.warning(
                    "data %s: nothing reads the columns %s", where, ", ".join(sorted(unread))
                )
            for column in columns_set:
                column.check()
            return cls.of(writer.finish(where))

    @classmethod
    def of(cls, written: Written) -> Self:
        """The rows that were written."""
        dataset = cls(
            written.tokens,
            written.token_ends,
            written.columns,
            written.columns_ends,
            written.fingerprint,
        )
        dataset._places = written.places
        if any(share.weight is not None for share in written.shares):
            dataset.shares = written.shares
        return dataset

    @classmethod
    def pass_rates(cls, config: DataConfig, field: str) -> PassRates | None:
        """The filter of data.pass_rate, which is for the prompts of data.train."""
        if config.pass_rate is None or field != "data.train":
            return None
        if not cls.answered:
            raise ValueError(
                f"data.pass_rate is {config.pass_rate}, and {cls.noun} have no pass rate; leave it "
                "out"
            )
        assert config.pass_rates is not None, "DataConfig saw to it"
        lowest, highest = config.pass_rate
        return PassRates(config.pass_rates, (lowest, highest))

    @classmethod
    def columns_read(cls, config: DataConfig, row: SourceRow) -> set[str]:
        """The columns of a row that its tokens or whoever scores it read."""
        return set(row.values)

    def __len__(self) -> int:
        return len(self._token_ends) // self.num_parts

    def place(self, row: int) -> str:
        """Where the row stands, as in messages: "train.jsonl, line 3"; empty for rows that were
        not read from a file."""
        return self._places[row] if self._places else ""

    @property
    def num_tokens(self) -> int:
        """Tokens of the first parts of all rows together."""
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
        """The row's plain values, its images aside."""
        values = self._values(row)
        values.pop(STORED, None)
        return values

    def _values(self, row: int) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(_cut(self._extras, self._extras_ends, row).tobytes())
        return values

    def images(self, rows: np.ndarray) -> dict[str, list[tuple[ImageReference, ...]]]:
        """The column `images` of these rows, for a model that sees them; none for another."""
        found: list[tuple[ImageReference, ...]] = []
        kept: dict[int, tuple[ImageReference, ...]] = {}
        for row in rows.tolist():
            if row not in kept:
                stored = self._values(row).get(STORED)
                if stored is None:
                    return {}
                place = self.place(row)
                kept[row] = tuple(reference_of(image, place) for image in stored)
            found.append(kept[row])
        return {IMAGES.name: found} if found else {}

    @property
    def num_images(self) -> int:
        """Images of all rows."""
        return sum(len(self._values(row).get(STORED, ())) for row in range(len(self)))

    @property
    def column_names(self) -> set[str]:
        """Names of the plain values that any row has."""
        names: set[str] = set()
        for row in range(len(self)):
            names.update(self.column_values(row))
        return names


def _chunks(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while chunk := list(islice(rows, READ_ROWS)):
        yield chunk


def _cut(values: np.ndarray, ends: np.ndarray, row: int) -> np.ndarray:
    start = 0
    if row:
        start = ends[row - 1]
    return values[start : ends[row]]
