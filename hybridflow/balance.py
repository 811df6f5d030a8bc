"""Karmarkar-Karp: cuts rows into parts of nearly equal total length, so that no rank waits for
another.

This is the largest differencing method for any number of parts (Karmarkar and Karp 1982, "The
differencing method of set partitioning"). Parts may have different numbers of rows.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

Part = tuple[int, int, int]
"""Sum of lengths, first row, last row; the rows between form a linked list. No rows: (0, -1,
-1)."""
EMPTY: Part = (0, -1, -1)


def balance(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Row indices (int64, ascending) of each of `num_parts` parts; every row is in exactly one
    part, and a part may be empty.

    lengths: non-negative integers [rows]. The same lengths give the same parts, heaviest first.

        >>> [part.tolist() for part in balance(np.array([8, 7, 6, 5, 4]), 2)]
        [[1, 3, 4], [0, 2]]
    """
    lengths = np.asarray(lengths)
    if num_parts < 1:
        raise ValueError(f"num_parts is {num_parts}; it must be at least 1")
    if lengths.ndim != 1 or (
        len(lengths) and (not np.issubdtype(lengths.dtype, np.integer) or lengths.min() < 0)
    ):
        raise ValueError(
            f"lengths is an array {lengths.shape} of {lengths.dtype}; use one dimension of "
            "non-negative integers"
        )
    if not len(lengths):
        return [np.zeros(0, dtype=np.int64) for _ in range(num_parts)]
    following = np.full(len(lengths), -1, dtype=np.int64).tolist()
    parts = _difference(lengths.tolist(), num_parts, following)
    return [_rows(part, following) for part in _full(parts, num_parts)]


@dataclass(slots=True)
class _Partial:
    """Some of the rows in parts, heaviest first; parts that are not listed are empty."""

    parts: list[Part]

    def spread(self, num_parts: int) -> int:
        return self.parts[0][0] - (self.parts[-1][0] if len(self.parts) == num_parts else 0)


def _difference(lengths: list[int], num_parts: int, following: list[int]) -> list[Part]:
    """Merges the two partial partitions of largest spread until a single one is left; ties are
    broken by age, so that the result is deterministic."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    heap = [
        (-lengths[row], age, _Partial([(lengths[row], row, row)])) for age, row in enumerate(order)
    ]
    if num_parts == 1:
        heap = [(0, age, partial) for _, age, partial in heap]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, age, left = heapq.heappop(heap)
        _, _, right = heap[0]
        merged = _merge(left, right, num_parts, following)
        heapq.heapreplace(heap, (-merged.spread(num_parts), age, merged))
    return heap[0][2].parts


def _merge(left: _Partial, right: _Partial, num_parts: int, following: list[int]) -> _Partial:
    """Joins the heaviest parts of `left` with the lightest of `right`."""
    if len(left.parts) + len(right.parts) <= num_parts:
        # Parts meet empty ones only. Rows come longest first, so most of the time they go to the
        # end.
        if left.parts[-1][0] >= right.parts[0][0]:
            left.parts.extend(right.parts)
            return left
        return _Partial(sorted(left.parts + right.parts, key=_weight, reverse=True))
    pairs = zip(_full(left.parts, num_parts), reversed(_full(right.parts, num_parts)), strict=True)
    return _Partial(
        sorted(
            (_chain(heavy, light, following) for heavy, light in pairs), key=_weight, reverse=True
        )
    )


def _chain(heavy: Part, light: Part, following: list[int]) -> Part:
    if light is EMPTY:
        return heavy
    if heavy is EMPTY:
        return light
    following[heavy[2]] = light[1]
    return heavy[0] + light[0], heavy[1], light[2]


def _weight(part: Part) -> int:
    return part[0]


def _full(parts: list[Part], num_parts: int) -> list[Part]:
    return parts + [EMPTY] * (num_parts - len(parts))


def _rows(part: Part, following: list[int]) -> np.ndarray:
    rows = []
    row = part[1]
    while row >= 0:
        rows.append(row)
        row = following[row]
    return np.array(sorted(rows), dtype=np.int64)
