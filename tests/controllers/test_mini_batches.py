"""mini_batch_column: laws that hold for any prompts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.algorithm_base import AlgorithmConfig, mini_batch_column

UIDS = st.lists(st.integers(0, 2**62), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(UIDS, st.integers(1, 12))
def test_every_row_is_dealt_once_and_evenly(uid: list[int], number: int) -> None:
    column = mini_batch_column(torch.tensor(uid), AlgorithmConfig(num_mini_batches=number))
    assert column.dtype is torch.int64 and len(column) == len(uid)
    sizes = torch.bincount(column, minlength=number)
    assert len(sizes) == number and int(sizes.sum()) == len(uid)
    assert int(sizes.max() - sizes.min()) <= 1


@settings(max_examples=30, deadline=None)
@given(UIDS, st.integers(1, 12), st.integers(0, 2**31))
def test_only_the_prompts_decide(uid: list[int], number: int, seed: int) -> None:
    """Neither torch's nor numpy's global state has a part in it."""
    first = mini_batch_column(torch.tensor(uid), AlgorithmConfig(num_mini_batches=number))
    torch.manual_seed(seed)
    assert torch.equal(
        first, mini_batch_column(torch.tensor(uid), AlgorithmConfig(num_mini_batches=number))
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_samples_of_a_prompt_share_a_mini_batch(
    number: int, times: int, samples: int, seed: int
) -> None:
    """Wherever prompts can be dealt evenly; each mini-batch then has the same number of them."""
    uid = seed + torch.arange(number * times).repeat_interleave(samples)
    column = mini_batch_column(uid, AlgorithmConfig(num_mini_batches=number))
    for prompt in uid.unique():
        assert len(column[uid == prompt].unique()) == 1
    assert torch.bincount(column, minlength=number).tolist() == [times * samples] * number


def test_no_rows_have_no_mini_batches() -> None:
    """A step may leave nothing to learn from."""
    assert not len(
        mini_batch_column(torch.zeros(0, dtype=torch.int64), AlgorithmConfig(num_mini_batches=2))
    )


def test_other_prompts_are_dealt_otherwise() -> None:
    config = AlgorithmConfig(num_mini_batches=4)
    columns = {
        tuple(mini_batch_column(torch.arange(start, start + 32), config).tolist())
        for start in range(8)
    }
    assert len(columns) == 8


def test_the_seed_decides_too() -> None:
    uid = torch.arange(32)
    columns = set()
    for seed in range(8):
        column = mini_batch_column(uid, AlgorithmConfig(num_mini_batches=4, seed=seed))
        assert torch.equal(
            column, mini_batch_column(uid, AlgorithmConfig(num_mini_batches=4, seed=seed))
        )
        columns.add(tuple(column.tolist()))
    assert len(columns) == 8
