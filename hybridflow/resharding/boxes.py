"""Arithmetic on many boxes at once: int64 arrays start[n, dims] and shape[n, dims].

Ranks and parameters do not appear here. `flat_range_boxes` turns a range of a flattened parameter
(ZeRO's partitions) into boxes.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from hybridflow.resharding.shards import Box

Ints = NDArray[np.int64]
_PAIRS_AT_ONCE = 4_000_000
"""Pairs of boxes compared in one NumPy expression (bounds the memory of a compile at a few
hundred MB)."""


def volumes(shape: Ints) -> Ints:
    """Elements of every box: int64 [n]."""
    return np.asarray(np.prod(shape, axis=1, dtype=np.int64))


def with_dims(array: Ints, dims: int, fill: int) -> Ints:
    """`array` [n, any] with `dims` columns: extended by `fill`, or cut where the further
    columns are fill."""
    if array.shape[1] >= dims:
        return array[:, :dims]
    return np.concatenate(
        [array, np.full((len(array), dims - array.shape[1]), fill, dtype=np.int64)], axis=1
    )


def distinct(start: Ints, shape: Ints) -> tuple[Ints, Ints, Ints]:
    """The distinct boxes and, for every box, which of them it is: start [k, dims], shape [k,
    dims], index [n]."""
    dims = start.shape[1]
    unique, inverse = np.unique(np.concatenate([start, shape], axis=1), axis=0, return_inverse=True)
    return unique[:, :dims], unique[:, dims:], inverse.reshape(-1).astype(np.int64)


def intersections(
    start: Ints, shape: Ints, other_start: Ints, other_shape: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """All non-empty intersections of two lists: (index into the first, index into the second,
    start, shape)."""
    parts = []
    step = max(1, _PAIRS_AT_ONCE // max(1, len(other_start)))
    for begin in range(0, max(1, len(start)), step):
        low = np.maximum(start[begin : begin + step, None], other_start[None])
        high = np.minimum(
            (start + shape)[begin : begin + step, None], (other_start + other_shape)[None]
        )
        first, second = np.nonzero((low < high).all(axis=2))
        parts.append((first + begin, second, low[first, second], (high - low)[first, second]))
    first, second, low, size = map(np.concatenate, zip(*parts, strict=True))
    return first, second, low, size


def overlapping(start: Ints, shape: Ints) -> bool:
    """True if two of the boxes share an element."""
    first, second, _, _ = intersections(start, shape, start, shape)
    return bool((first != second).any())


def contains(start: Ints, shape: Ints, inner_start: Ints, inner_shape: Ints) -> NDArray[np.bool_]:
    """bool [n, m]: box i holds all of inner box j."""
    below = (start[:, None] <= inner_start[None]).all(axis=2)
    above = ((inner_start + inner_shape)[None] <= (start + shape)[:, None]).all(axis=2)
    return np.asarray(below & above)


def disjoint_parts(start: Ints, shape: Ints) -> tuple[Ints, Ints]:
    """Disjoint boxes with the same union, such that every given box is a union of some of them.

    The boxes themselves where they are disjoint (the usual case); otherwise the cells of the grid
    of all their faces.
    """
    start, shape, _ = distinct(start, shape)
    if not overlapping(start, shape):
        return start, shape
    dims = start.shape[1]
    lows, sizes = [], []
    for dim in range(dims):
        faces = np.unique(np.concatenate([start[:, dim], (start + shape)[:, dim]]))
        lows.append(faces[:-1])
        sizes.append(np.diff(faces))
    low = np.stack(np.meshgrid(*lows, indexing="ij"), axis=-1).reshape(-1, dims)
    size = np.stack(np.meshgrid(*sizes, indexing="ij"), axis=-1).reshape(-1, dims)
    inside = contains(start, shape, low, size).any(axis=0)
    return low[inside], size[inside]


def split(
    start: tuple[int, ...], shape: tuple[int, ...], limit: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of at most `limit` elements, cut along the outermost dims first so that the parts
    stay contiguous in memory."""
    if prod(shape) <= limit:
        return [(start, shape)]
    dim = next(i for i, size in enumerate(shape) if size > 1)
    step = max(1, limit // prod(shape[dim + 1 :]))
    parts = []
    for offset in range(0, shape[dim], step):
        size = min(step, shape[dim] - offset)
        part_start = (*start[:dim], start[dim] + offset, *start[dim + 1 :])
        parts += split(part_start, (*shape[:dim], size, *shape[dim + 1 :]), limit)
    return parts


def flat_range_boxes(shape: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """The boxes whose elements, in order, are elements begin..end-1 of the flattened (row-major)
    parameter.

    At most 2 * dims - 1 boxes, each contiguous in a flat memory that holds the range:

        >>> flat_range_boxes((4, 10), 7, 25)
        [Box(start=(0, 7), shape=(1, 3)), Box(start=(1, 0), shape=(1, 10)), Box(start=(2, 0), shape=(1, 5))]
    """
    if not 0 <= begin <= end <= prod(shape):
        raise ValueError(f"flat range {begin}..{end} is outside 0..{prod(shape)} of shape {shape}")
    if begin == end:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = begin // row, (end - 1) // row

    def inner(index: int, low: int, high: int) -> list[Box]:
        return [
            Box((index, *box.start), (1, *box.shape))
            for box in flat_range_boxes(shape[1:], low, high)
        ]

    if first == last and (begin % row or end % row):
        return inner(first, begin - first * row, end - first * row)
    boxes = []
    if begin % row:
        boxes += inner(first, begin % row, row)
        first += 1
    whole_end = end // row
    if whole_end > first:
        boxes.append(Box((first, *(0,) * len(shape[1:])), (whole_end - first, *shape[1:])))
    if end % row:
        boxes += inner(whole_end, 0, end % row)
    return boxes
