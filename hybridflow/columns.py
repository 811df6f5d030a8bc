"""Columns of batches, each declared once, and the blocks that store a column's data.

A block is the part of a column that a process wrote: numpy arrays (so that Ray moves them through
shared memory without a copy) or a list of Python values. Where blocks are stored is in
hybridflow/store.py, the choice of rows in hybridflow/batch.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

RAGGED = "time"
"""A second dimension of this name makes a column ragged: each row has its own length and no
padding is stored."""

BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class Column:
    """A declaration: Column("response_ids", "batch time", "int64", "sampled tokens, end-of-sequence
    included")."""

    name: str
    dims: str
    """"batch" first; "batch time" is ragged; anything else is dense."""
    dtype: str
    """A torch dtype's name, or "object" for plain Python values."""
    doc: str = ""

    @property
    def is_ragged(self) -> bool:
        return self.dims.split()[1:2] == [RAGGED]


COLUMNS: dict[str, Column] = {}
"""All declared columns by name; filled by declare()."""


def declare(name: str, dims: str, dtype: str, doc: str) -> Column:
    """Declares a column; a second, different declaration of its name is a ValueError."""
    column = Column(name, dims, dtype, doc)
    if dims.split()[:1] != ["batch"]:
        raise ValueError(f"column {name!r}: dims {dims!r} must begin with 'batch'")
    if dtype != "object" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"column {name!r}: dtype {dtype!r} is neither a torch dtype nor 'object'")
    if COLUMNS.setdefault(name, column) != column:
        raise ValueError(
            f"column {name!r} is declared twice: {COLUMNS[name]} and {column}; choose another name"
        )
    return column


def _known_columns() -> str:
    return ", ".join(sorted(COLUMNS))


def declared(name: str) -> Column:
    """Its declaration; a ValueError for a column that nobody declared."""
    if name not in COLUMNS:
        close = get_close_matches(name, COLUMNS, n=3)
        known = f"Did you mean {' or '.join(close)}?" if close else f"Known: {_known_columns()}"
        raise ValueError(
            f"column {name!r} is not declared; declare it with hybridflow.columns.declare. {known}"
        )
    return COLUMNS[name]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of different lengths without padding.

    >>> ragged = Ragged.of([[1, 2, 3], [4]])
    >>> ragged.values, ragged.lengths, ragged[1]
    (tensor([1, 2, 3, 4]), tensor([3, 1]), tensor([4]))
    """

    values: Tensor
    """[sum(lengths), ...]"""
    lengths: Tensor
    """int64 [rows]"""

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != len(self.values):
            raise ValueError(
                f"ragged: lengths add up to {int(self.lengths.sum())}, but there are "
                f"{len(self.values)} values"
            )

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: torch.dtype | None = None) -> Ragged:
        """From a sequence, array or tensor for each row; without rows the values are int64 unless
        `dtype` says otherwise."""
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        # An empty list is a tensor of floats to torch, and would make floats of all rows.
        filled = [tensor for tensor in tensors if len(tensor)] or tensors
        values = torch.cat(filled) if filled else torch.empty(0, dtype=dtype or torch.int64)
        return cls(values, torch.tensor([len(row) for row in tensors], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Tensor:
        start = int(self.lengths[:row].sum())
        return self.values[start : start + int(self.lengths[row])]

    def unbind(self) -> list[Tensor]:
        """A view for each row, [lengths[row], ...]."""
        return list(self.values.split(self.lengths.tolist()))


Value = Tensor | Ragged | list[Any]
"""The value of a column that is read: dense, ragged, or plain Python values."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The data of one column for some rows, as it is stored."""

    data: Any
    """numpy [rows, ...] (dense), numpy [tokens, ...] (ragged), or a list (object)."""
    dtype: str
    offsets: np.ndarray | None = None
    """int64 [rows + 1], ragged only: row i is data[offsets[i]:offsets[i + 1]]."""

    @property
    def num_rows(self) -> int:
        return len(self.data) if self.offsets is None else len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, np.ndarray) else 0

    @classmethod
    def of(cls, name: str, value: Any) -> Block:
        """Checks a value against the column's declaration and wraps it without copying what can
        be viewed."""
        column = declared(name)
        if column.dtype == "object":
            if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
                raise ValueError(
                    f"column {name!r} has a Python value for each row: give a list, not "
                    f"{type(value).__name__}"
                )
            return cls(list(value), "object")
        if column.is_ragged:
            if not isinstance(value, Ragged):
                raise ValueError(
                    f"column {name!r} has dims {column.dims!r}: give a Ragged, not "
                    f"{type(value).__name__}"
                )
            lengths = value.lengths.numpy()
            offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
            return cls(_to_numpy(name, column, value.values), column.dtype, offsets)
        return cls(_to_numpy(name, column, _dense(name, column, value)), column.dtype)

    def value(self) -> Value:
        if self.dtype == "object":
            values: list[Any] = self.data
            return values
        if self.offsets is None:
            return _to_tensor(self.data, self.dtype)
        return Ragged(_to_tensor(self.data, self.dtype), torch.from_numpy(np.diff(self.offsets)))

    def rows(self, index: np.ndarray) -> Block:
        """The given rows; a view where they are consecutive."""
        first, count = (int(index[0]), len(index)) if len(index) else (0, 0)
        consecutive = count == 0 or (
            int(index[-1]) - first == count - 1 and bool((np.diff(index) == 1).all())
        )
        if consecutive and first == 0 and count == self.num_rows:
            return self
        if self.dtype == "object":
            return Block([self.data[i] for i in index], "object")
        if self.offsets is None:
            return Block(
                self.data[first : first + count] if consecutive else self.data[index], self.dtype
            )
        if consecutive:
            offsets = self.offsets[first : first + count + 1]
            return Block(self.data[offsets[0] : offsets[-1]], self.dtype, offsets - offsets[0])
        lengths = np.diff(self.offsets)[index]
        offsets = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Block(self.data[positions], self.dtype, offsets)

    @staticmethod
    def concat(blocks: Sequence[Block]) -> Block:
        if len(blocks) == 1:
            return blocks[0]
        first = blocks[0]
        if first.dtype == "object":
            return Block(list(chain.from_iterable(block.data for block in blocks)), "object")
        data = np.concatenate([block.data for block in blocks])
        if first.offsets is None:
            return Block(data, first.dtype)
        lengths = []
        for block in blocks:
            if block.offsets is not None:
                lengths.append(np.diff(block.offsets))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        return Block(data, first.dtype, offsets)


def _dense(name: str, column: Column, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"column {name!r} has dims {column.dims!r}: give a tensor, an array or a list of "
            f"numbers, not {type(value).__name__} ({error})"
        ) from None
    if tensor.ndim == 0:
        raise ValueError(
            f"column {name!r} has dims {column.dims!r}: {value!r} has no rows; give one value for "
            "each row"
        )
    return tensor


def _to_numpy(name: str, column: Column, tensor: Tensor) -> np.ndarray:
    dtype: torch.dtype = getattr(torch, column.dtype)
    if tensor.dtype != dtype and (tensor.is_floating_point() != dtype.is_floating_point):
        raise ValueError(
            f"column {name!r} is declared {column.dtype}, but {tensor.dtype} was given; convert it"
        )
    tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)  # numpy has no bfloat16
    return tensor.numpy()


def _to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    with warnings.catch_warnings():
        # Ray's shared memory is read-only and torch has no read-only tensors. Nobody writes into a
        # batch's columns in place.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == BFLOAT16 else tensor
