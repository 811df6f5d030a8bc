"""RowWriter: appends encoded rows to two open files, leaves out those that settings leave out, and
says in one line how many there were."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, BinaryIO, cast
from uuid import UUID

import numpy as np
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig, EqualPairs, Overlong
from controllers.data.pass_rates import PassRates
from controllers.data.sources import Source, SourceRow
from hybridflow.wording import counted

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """EncodedRow(parts=([5, 6], [7, 1]), num_tokens=4, columns={"answer": "7"})"""

    parts: Sequence[Sequence[int]]
    """The row's token sequences (or other integers, such as a mask)."""
    num_tokens: int
    """The length that is compared with the limit."""
    mask_length: int = 0
    """Numbers in `parts` that are no tokens but a mask of them."""
    columns: dict[str, Any]
    unusable: str = ""
    """Why a pair says nothing, such as "equal responses"; data.equal_pairs says what happens to
    it."""


@dataclass(frozen=True, slots=True)
class Share:
    """Share("easy.jsonl", num_rows=40, weight=3.0): the rows of one source, which follow those of
    the source before it."""

    place: str
    num_rows: int
    weight: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The rows as arrays, mapped from the files."""

    tokens: np.ndarray
    token_ends: np.ndarray
    columns: np.ndarray
    columns_ends: np.ndarray
    fingerprint: str
    places: list[str]
    shares: list[Share]


class VocabularyCheck:
    """Refuses a row with a token that the model does not know, before anything starts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: tuple[str, int] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.role, self.size = vocabulary or ("", 2**31)

    def __call__(self, row: SourceRow, parts: Sequence[np.ndarray]) -> None:
        for part in parts:
            highest = int(part.max(initial=0))
            if highest >= self.size:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                raise ValueError(
                    f"{row.place}: token {highest} ({token!r}) is outside the vocabulary of "
                    f"{self.role}'s model, which has {self.size} tokens; the tokenizer has "
                    f"{len(self.tokenizer)}: use the model's own tokenizer, or resize the model's "
                    "embeddings to it"
                )


class RowWriter:
    """writer = RowWriter(tokens, columns, config, "max_tokens", "pairs", None)
    writer.begin(source); writer.add(row, encoded); ...; written = writer.finish(where)
    """

    def __init__(
        self,
        tokens: Any,
        columns: Any,
        config: DataConfig,
        length_limit: str,
        noun: str,
        pass_rates: PassRates | None,
    ) -> None:
        self.tokens, self.columns = cast(BinaryIO, tokens), cast(BinaryIO, columns)
        self.config, self.noun, self.pass_rates = config, noun, pass_rates
        self.check: VocabularyCheck | None = None
        self.limit_name, self.limit = length_limit, vars(config)[length_limit]
        self.hash = hashlib.sha256()
        self.places: list[str] = []
        self.token_ends: list[int] = []
        self.columns_ends: list[int] = []
        self.shares: list[Share] = []
        self.seen: set[bytes] = set()
        self.source: Source | None = None
        self.num_rows, self.first, self.longest = 0, 0, 0
        self.num_tokens = 0
        """Tokens of the rows that are used; a pair has its prompt once and both responses."""
        self.dropped: dict[str, int] = {}
        """Reason -> rows, for the log."""

    def begin(self, source: Source) -> None:
        """The rows that follow are this source's."""
        self._end_share()
        self.source, self.first = source, self.num_rows

    def _end_share(self) -> None:
        if self.source is not None:
            num_rows = self.num_rows - self.first
            self.shares.append(Share(self.source.place, num_rows, self.source.weight))
            self.source = None

    def add(self, row: SourceRow, encoded: EncodedRow) -> None:
        columns = encode_columns(row, encoded.columns)
        arrays = [np.asarray(part, dtype=np.int32) for part in encoded.parts]
        if self.check is not None:
            self.check(row, arrays)
        parts = [array.tobytes() for array in arrays]
        reason = self._reason(row, encoded, parts, columns)
        if reason:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            return
        self.num_rows += 1
        self.num_tokens += sum(map(len, arrays)) - encoded.mask_length
        self.places.append(row.place)
        for part in parts:
            self._append(self.tokens, self.token_ends, part, 4)
        self._append(self.columns, self.columns_ends, columns, 1)

    def _reason(
        self, row: SourceRow, encoded: EncodedRow, parts: Sequence[bytes], columns: bytes
    ) -> str:
        """Why the row is left out; empty for a row that is used."""
        if encoded.unusable:
            if self.config.equal_pairs is EqualPairs.error:
                raise ValueError(
                    f"{row.place}: {encoded.unusable}, which prefers nothing; remove the row, or "
                    "set data.equal_pairs=drop"
                )
            return f"with {encoded.unusable}"
        if encoded.num_tokens > self.limit:
            if self.config.overlong is Overlong.error:
                raise ValueError(
                    f"{row.place}: {encoded.num_tokens} tokens, over "
                    f"data.{self.limit_name}={self.limit}; raise it, or set data.overlong=drop"
                )
            self.longest = max(self.longest, encoded.num_tokens)
            return f"with more than data.{self.limit_name}={self.limit} tokens"
        if self.pass_rates is not None and not self.pass_rates.keep(row):
            return "with a pass rate outside data.pass_rate"
        if self.config.remove_duplicates:
            digest = hashlib.blake2b(columns, digest_size=16)
            for part in parts:
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            if digest.digest() in self.seen:
                return "that equal an earlier one (data.remove_duplicates)"
            self.seen.add(digest.digest())
        return ""

    def _append(self, file: BinaryIO, ends: list[int], data: bytes, width: int) -> None:
        start = 0
        if ends:
            start = ends[-1]
        file.write(data)
        ends.append(start + len(data) // width)
        self.hash.update(len(data).to_bytes(8, "little"))
        self.hash.update(data)

    def finish(self, where: object) -> Written:
        self._end_share()
        self._check(where)
        self._log(where)
        self.tokens.flush()
        self.columns.flush()
        return Written(
            tokens=np.memmap(self.tokens, dtype=np.int32, mode="r"),
            token_ends=np.asarray(self.token_ends, dtype=np.int64),
            columns=np.memmap(self.columns, dtype=np.uint8, mode="r"),
            columns_ends=np.asarray(self.columns_ends, dtype=np.int64),
            fingerprint=self.hash.hexdigest(),
            places=self.places,
            shares=self.shares,
        )

    def _check(self, where: object) -> None:
        num_dropped = sum(self.dropped.values())
        if not self.num_rows:
            fix = "give a file that has some"
            every = f"all {num_dropped} {self.noun} are"
            if num_dropped == 1:
                every = f"its only {self.noun.removesuffix('s')} is"
            if self.longest and len(self.dropped) == 1:
                limit = f"data.{self.limit_name}={self.limit}"
                fix = f"{every} over {limit}, raise it"
            elif self.dropped:
                fix = f"{every} left out: {self._reasons()}"
            raise ValueError(f"data {where!r} has no rows; {fix}")
        weighted = any(share.weight is not None for share in self.shares)
        for share in self.shares:
            if weighted and not share.num_rows:
                raise ValueError(
                    f"data {share.place!r} has no rows that are used, and a share of every epoch "
                    f"by its weight; leave it out (left out of all: {self._reasons() or 'none'})"
                )

    def _reasons(self) -> str:
        texts = []
        for reason, count in self.dropped.items():
            longest = ""
            if reason.startswith("with more than"):
                longest = f" (the longest has {self.longest})"
            texts.append(f"{count} {reason}{longest}")
        return ", ".join(texts)

    def _log(self, where: object) -> None:
        num_dropped = sum(self.dropped.values())
        tail = ""
        if num_dropped:
            tail = f"; dropped {num_dropped} of {num_dropped + self.num_rows}: {self._reasons()}"
        level = logging.INFO
        if num_dropped:
            level = logging.WARNING
        LOGGER.log(
            level,
            "data %s: %s, %.1f tokens each on average%s",
            where,
            counted(self.num_rows, self.noun),
            self.num_tokens / self.num_rows,
            tail,
        )


def encode_columns(row: SourceRow, columns: dict[str, Any]) -> bytes:
    """The row's plain values as JSON; dates, times and decimals of parquet files as their text, which
    other kinds of file hold in their place."""
    try:
        return json.dumps(columns, default=_as_text).encode()
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


def _as_text(value: object) -> str:
    match value:
        case date() | time():  # of which datetime is one
            return value.isoformat()
        case Decimal() | timedelta() | UUID():
            return str(value)
    raise TypeError(type(value).__name__)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, default=_as_text)
    except (TypeError, ValueError):
        return False
    return True
