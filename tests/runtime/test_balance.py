"""Karmarkar-Karp partitions: nothing lost, nothing twice, and better than what dealing out rows
in turn gives."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.balance import balance


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(1, 12))
def test_every_row_is_in_exactly_one_part_and_no_part_is_too_heavy(
    lengths: list[int], num_parts: int
) -> None:
    values = np.array(lengths, dtype=np.int64)
    parts = balance(values, num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all((np.diff(part) > 0).all() for part in parts)
    sums = [int(values[part].sum()) for part in parts]
    # A differencing partition's spread never exceeds the longest row.
    assert max(sums) - min(sums) <= max(lengths, default=0)
    again = balance(values, num_parts)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 3))
def test_close_to_the_best_partition_of_small_inputs(lengths: list[int], num_parts: int) -> None:
    values = np.array(lengths)
    best = min(
        max(np.bincount(choice, values, num_parts))
        for choice in product(range(num_parts), repeat=len(lengths))
    )
    heaviest = max(values[part].sum() for part in balance(values, num_parts))
    assert best <= heaviest <= 4 / 3 * best


def test_two_parts_by_hand() -> None:
    # Differencing: 8 - 7 = 1, 6 - 5 = 1, 4 - 1 = 3, 3 - 1 = 2: 7 + 5 + 4 against 8 + 6.
    assert [part.tolist() for part in balance(np.array([8, 7, 6, 5, 4]), 2)] == [[1, 3, 4], [0, 2]]


def test_more_parts_than_rows_and_no_rows() -> None:
    assert [len(part) for part in balance(np.array([3, 5]), 4)] == [1, 1, 0, 0]
    assert [len(part) for part in balance(np.zeros(0, dtype=np.int64), 3)] == [0, 0, 0]


def test_a_hundred_thousand_rows_over_512_ranks() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 100_000)
    start = time.process_time()
    parts = balance(lengths, 512)
    seconds = time.process_time() - start
    sums = np.array([lengths[part].sum() for part in parts])
    assert sums.max() / sums.mean() < 1.0005
    assert seconds < 5


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_parts is 0"):
        balance(np.array([1]), 0)
    with pytest.raises(ValueError, match="non-negative integers"):
        balance(np.array([1.5]), 2)
    with pytest.raises(ValueError, match="non-negative integers"):
        balance(np.array([-1]), 2)
