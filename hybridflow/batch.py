"""Batch: named columns over rows, as references; the data stays where it was made.

select, |, split, concat, reorder, repeat and rows touch metadata only. Reading a column fetches
that column, and only its rows. The same class stands on both sides of a call: a worker gets the
rows and columns that its method reads, already local.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from hybridflow import store
from hybridflow.columns import Block, Column, Ragged, Value, declare, declared
from hybridflow.store import Held, Ref

SAMPLE = declare(
    "sample", "batch", "int64", "number of the sample among the repetitions of its row, from 0"
)


@dataclass(frozen=True, slots=True, eq=False)
class RowRange:
    """One block of a column: where it is and how many rows it has."""

    ref: Ref
    num_rows: int
    node: str | None = None
    """Ray's id of the node that made it; None where it does not matter."""


@dataclass(frozen=True, slots=True, eq=False)
class ColumnEntry:
    """One column of a batch: row i is row index[i] of the pieces laid end to end."""

    column: Column
    pieces: tuple[RowRange, ...]
    index: np.ndarray


class Batch(Mapping[str, Value]):
    """>>> batch = Batch.of(prompt_ids=Ragged.of([[5, 6], [7]]), answer=["a", "b"])
    >>> batch |= critic.compute_values(batch)          # returns at once; adds the column "values"
    >>> batch["values"]                                # waits, fetches this column only
    >>> small, large = batch.reorder([1, 0]).split(2)  # metadata only
    """

    __slots__ = ("_answered", "_entries", "_num_rows")

    def __init__(self, entries: Mapping[str, ColumnEntry], num_rows: int) -> None:
        self._entries = dict(entries)
        self._num_rows = num_rows
        self._answered: np.ndarray | None = None
        """bool [asked rows]: see only_where."""

    @classmethod
    def of(cls, **columns: Any) -> Batch:
        """A batch of values in this process: tensors or arrays (dense), Ragged, lists of Python
        values (object)."""
        blocks: dict[str, Block] = {}
        counts: dict[str, int] = {}
        for name, value in columns.items():
            blocks[name] = Block.of(name, value)
            counts[name] = blocks[name].num_rows
        if len(set(counts.values())) > 1:
            raise ValueError(f"batch: columns have different numbers of rows: {counts}")
        return cls.of_blocks(blocks, next(iter(counts.values()), 0))

    @classmethod
    def of_blocks(cls, blocks: Mapping[str, Block], num_rows: int) -> Batch:
        """A batch of blocks of this process with `num_rows` rows each."""
        return cls.of_refs({name: Held(block) for name, block in blocks.items()}, num_rows)

    @classmethod
    def of_refs(cls, refs: Mapping[str, Ref], num_rows: int, node: str | None = None) -> Batch:
        """A batch of one block of `num_rows` rows for each column, made on `node`."""
        # One object, which rows() then reorders once for all columns.
        everything = np.arange(num_rows)
        entries = {}
        for name, ref in refs.items():
            entries[name] = ColumnEntry(
                declared(name), (RowRange(ref, num_rows, node),), everything
            )
        return cls(entries, num_rows)

    @property
    def num_rows(self) -> int:
        """The number of rows, which all columns share; len(batch) is the same."""
        return self._num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in the order in which they were added; nothing is fetched."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __bool__(self) -> bool:
        return self._num_rows > 0

    # Two batches are the same if they are one object: comparing columns would fetch them.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Batch({self._num_rows} rows: {', '.join(self._entries)})"

    def __getitem__(self, name: str) -> Value:
        """Fetches one column."""
        return self.block(name).value()

    def block(self, name: str) -> Block:
        """The stored form of one column, rows in order."""
        return self.blocks((name,))[0]

    def ragged(self, name: str) -> Ragged:
        """Fetches a ragged column: flat values [sum(lengths), ...] and lengths int64 [rows].

        A ValueError if the batch has no such column, an AssertionError if it is not ragged.
        """
        value = self[name]
        assert isinstance(value, Ragged), f"column {name} is not ragged"
        return value

    def tensor(self, name: str) -> Tensor:
        """Fetches a dense column, [rows, ...] of the dtype that it is declared with.

        A ValueError if the batch has no such column, an AssertionError if it is not dense.
        """
        value = self[name]
        assert isinstance(value, Tensor), f"column {name} is not dense"
        return value

    def objects(self, name: str) -> list[Any]:
        """Fetches a column of Python values, one for each row.

        A ValueError if the batch has no such column, an AssertionError if it holds tensors.
        """
        value = self[name]
        assert isinstance(value, list), f"column {name} does not hold Python values"
        return value

    def blocks(self, names: Sequence[str], here: str | None = None) -> list[Block]:
        """Several columns in one wait; `here` is the node of the reader."""
        requests: list[tuple[Ref, np.ndarray, str | None]] = []
        shapes: list[tuple[int, np.ndarray | None]] = []
        for name in names:
            entry = self._entry(name)
            parts, order = _rows_of_pieces(entry)
            for piece, rows in parts:
                requests.append((piece.ref, rows, piece.node))
            shapes.append((len(parts), order))
        arrived = iter(store.fetch_rows(requests, here))
        result = []
        for count, order in shapes:
            block = Block.concat(list(islice(arrived, count)))
            result.append(block if order is None else block.rows(order))
        return result

    def local(self, names: Sequence[str], here: str | None = None) -> Batch:
        """These columns fetched into this process."""
        blocks = dict(zip(names, self.blocks(names, here), strict=True))
        return Batch.of_blocks(blocks, self._num_rows)

    def stored(self) -> Batch:
        """The same batch with nothing in this process: blocks that were made here are put into
        Ray's store, once."""
        stored = {name: _stored(entry) for name, entry in self._entries.items()}
        return Batch(stored, self._num_rows)

    # Metadata only, from here on.

    def refs(self) -> list[Ref]:
        """References to the blocks of other processes that it is made of."""
        refs = []
        for entry in self._entries.values():
            for piece in entry.pieces:
                if not isinstance(piece.ref, Held):
                    refs.append(piece.ref)
        return refs

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that it has no column for."""
        return [name for name in names if name not in self._entries]

    def select(self, *names: str) -> Batch:
        """The same rows with these columns only; a ValueError names one that is missing. Nothing is
        fetched."""
        return Batch({name: self._entry(name) for name in names}, self._num_rows)

    def drop(self, *names: str) -> Batch:
        """The same rows without these columns; names that it does not have are ignored. Nothing is
        fetched."""
        return Batch(
            {name: entry for name, entry in self._entries.items() if name not in names},
            self._num_rows,
        )

    def rename(self, **new_names: str) -> Batch:
        """rename(rewards="baseline_rewards"): the new name must be declared with the same dims
        and dtype."""
        entries = dict(self._entries)
        for old, new in new_names.items():
            entry, column = self._entry(old), declared(new)
            if (column.dims, column.dtype) != (entry.column.dims, entry.column.dtype):
                raise ValueError(
                    f"batch: {old!r} can't become {new!r}: {entry.column} and {column} differ in "
                    "dims or dtype"
                )
            del entries[old]
            entries[new] = replace(entry, column=column)
        return Batch(entries, self._num_rows)

    def __or__(self, other: Batch) -> Batch:
        """Both batches' columns, row by row."""
        if not isinstance(other, Batch):
            return NotImplemented
        twice, known = [], ""
        for name, entry in other._entries.items():
            if name in self._entries and entry is not self._entries[name]:
                twice.append(name)
                calls = [*_writers(self._entries[name]), *_writers(entry)]
                if calls:
                    known += f"; {name} is written by {' and '.join(calls)}"
        if twice:
            raise ValueError(
                f"batch: columns {twice} are in both; rename or drop them in one{known}"
            )
        answered = other._answered
        if answered is not None and self._num_rows == len(answered):
            return self.rows(answered) | other.rows(np.arange(len(other)))
        if self._entries and other._entries and self._num_rows != other._num_rows:
            raise ValueError(
                f"batch: {self._num_rows} rows | {other._num_rows} rows; both must have the same "
                "rows"
            )
        return Batch(
            {**self._entries, **other._entries},
            self._num_rows if self._entries else other._num_rows,
        )

    def rows(self, index: Any) -> Batch:
        """The rows at `index` (integers or a bool mask), in that order."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64, copy=False)
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= self._num_rows):
            raise ValueError(
                f"batch: rows {int(index.min())}..{int(index.max())} of a batch of "
                f"{self._num_rows} rows"
            )
        moved: dict[int, np.ndarray] = {}
        entries = {}
        for name, entry in self._entries.items():
            if id(entry.index) not in moved:
                moved[id(entry.index)] = entry.index[index]
            entries[name] = replace(entry, index=moved[id(entry.index)])
        return Batch(entries, len(index))

    def only_where(self, answered: Any) -> Batch:
        """The rows of an answer where the mask is True: those that were asked about without one
        are left out of `asked | answer` as well."""
        mask = np.asarray(answered, dtype=bool)
        chosen = self.rows(mask)
        chosen._answered = mask
        return chosen

    def reorder(self, order: Any) -> Batch:
        """All rows in another order."""
        order = np.asarray(order)
        if (
            len(order) != self._num_rows
            or (np.bincount(order, minlength=self._num_rows) != 1).any()
        ):
            raise ValueError(
                f"batch: reorder needs every one of {self._num_rows} rows exactly once"
            )
        return self.rows(order)

    def split(self, parts: int | Sequence[int]) -> list[Batch]:
        """Consecutive parts: a number of parts as equal as possible, or the number of rows of
        each."""
        if isinstance(parts, int):
            if parts < 1:
                raise ValueError(f"batch: split({parts}); give 1 or more parts")
            sizes = list(map(len, np.array_split(np.arange(self._num_rows), parts)))
        else:
            sizes = list(parts)
        if sum(sizes) != self._num_rows:
            raise ValueError(
                f"batch: split into {sizes} adds up to {sum(sizes)}, not to {self._num_rows} rows"
            )
        batches, start = [], 0
        for size in sizes:
            batches.append(self.rows(np.arange(start, start + size)))
            start += size
        return batches

    def repeat(self, times: int) -> Batch:
        """Every row `times` times in a row, numbered by the new column `sample`."""
        if times < 1:
            raise ValueError(f"batch: repeat({times}); give 1 or more")
        repeated = self.rows(np.repeat(np.arange(self._num_rows), times))
        return repeated.drop("sample") | Batch.of(sample=np.tile(np.arange(times), self._num_rows))

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """The rows of all batches, one batch after the other; all must have the same columns."""
        if not batches:
            raise ValueError("batch: concat of no batches")
        names = batches[0].columns
        for batch in batches[1:]:
            if set(batch.columns) != set(names):
                raise ValueError(
                    f"batch: concat of different columns: {sorted(names)} and "
                    f"{sorted(batch.columns)}"
                )
        entries = {}
        for name in names:
            entries[name] = _concat([batch._entries[name] for batch in batches])
        return Batch(entries, sum(map(len, batches)))

    def _entry(self, name: str) -> ColumnEntry:
        if not isinstance(name, str):
            raise ValueError(
                f"batch: {name!r} is no column's name; batch.rows([0, 1]) takes rows, "
                "batch.split(2) parts"
            )
        if name not in self._entries:
            raise ValueError(
                f"batch: no column {name!r}; it has {', '.join(self._entries) or 'none'}"
            )
        return self._entries[name]


def _writers(entry: ColumnEntry) -> list[str]:
    """The calls that would write it, in a traced step."""
    writers: dict[str, None] = {}
    for piece in entry.pieces:
        if isinstance(piece.ref, store.Abstract):
            writers[piece.ref.writer] = None
    return list(writers)


def _stored(entry: ColumnEntry) -> ColumnEntry:
    """The column with its blocks of this process in Ray's store; the same object if it has none."""
    pieces, moved = list(entry.pieces), False
    for number, piece in enumerate(pieces):
        if isinstance(piece.ref, Held):
            pieces[number], moved = replace(piece, ref=store.put(piece.ref)), True
    return replace(entry, pieces=tuple(pieces)) if moved else entry


def _starts(entry: ColumnEntry) -> np.ndarray:
    """[pieces + 1]: the position of each piece's first row in the column as written, and the end."""
    return np.cumsum([0] + [piece.num_rows for piece in entry.pieces])


def _rows_of_pieces(
    entry: ColumnEntry,
) -> tuple[list[tuple[RowRange, np.ndarray]], np.ndarray | None]:
    """Which rows of which pieces make up the column, and the order that brings them into place
    (None: already there)."""
    if len(entry.pieces) == 1:
        return [(entry.pieces[0], entry.index)], None
    starts = _starts(entry)
    owner = np.searchsorted(starts, entry.index, side="right") - 1
    order = np.argsort(owner, kind="stable")
    parts = []
    for piece in np.unique(owner):
        parts.append((entry.pieces[piece], entry.index[owner == piece] - starts[piece]))
    if not parts:
        return [(entry.pieces[0], entry.index)], None
    in_place = bool((np.diff(owner) >= 0).all())
    return parts, None if in_place else np.argsort(order, kind="stable")


def _concat(entries: Sequence[ColumnEntry]) -> ColumnEntry:
    pieces: dict[int, tuple[RowRange, int]] = {}
    total = 0
    indices = []
    for entry in entries:
        places = []
        for piece in entry.pieces:
            if id(piece) not in pieces:
                pieces[id(piece)] = (piece, total)
                total += piece.num_rows
            places.append(pieces[id(piece)][1])
        starts = _starts(entry)
        owner = np.searchsorted(starts, entry.index, side="right") - 1
        shift = np.asarray(places, dtype=np.int64) - starts[:-1]
        indices.append(entry.index + shift[owner])
    return ColumnEntry(
        entries[0].column, tuple(piece for piece, _ in pieces.values()), np.concatenate(indices)
    )
