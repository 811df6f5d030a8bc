"""Protocols: split then collect is the identity; who gets what, against the paper's table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.batch import Batch
from hybridflow.layout import Layout
from hybridflow.protocols import (
    ALL_TO_ALL,
    DP,
    ONE_TO_ALL,
    PROTOCOLS,
    THREE_D,
    THREE_D_ALL_MICRO_DP,
    THREE_D_PP_ONLY,
    Arguments,
    Split,
    cut_rows,
)
from tests.runtime.workers import numbers

LAYOUTS = st.builds(
    lambda dp, pp, tp: Layout.of(dp=dp, pp=pp, tp=tp),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
SPLITS = st.sampled_from(
    [
        Split(),
        Split(balance="test_length"),
        Split(within="test_label"),
        Split(balance="test_length", within="test_label"),
        Split(balance="test_length", within="test_label", near="test_group"),
        Split(near="test_label"),
    ]
)


@given(
    st.sampled_from([THREE_D, THREE_D_ALL_MICRO_DP, DP]),
    LAYOUTS,
    SPLITS,
    st.integers(0, 40),
    st.integers(0, 5),
)
def test_split_then_collect_is_the_identity(
    protocol, layout: Layout, split: Split, rows: int, seed: int
) -> None:  # type: ignore[no-untyped-def]
    batch = numbers(rows, seed)
    distribution = protocol.distribute(layout, Arguments((batch,)), split)
    assert distribution.rows is not None
    collected = list(protocol.collected(layout))
    result = protocol.collect(layout, [distribution.arguments[rank].args[0] for rank in collected])
    order = np.argsort(
        np.concatenate([distribution.rows[rank] for rank in collected]), kind="stable"
    )
    for name in batch.columns:
        restored, original = result.rows(order)[name], batch[name]
        if name == "test_ids":
            restored, original = (
                [r.tolist() for r in restored.unbind()],
                [r.tolist() for r in original.unbind()],
            )  # type: ignore[union-attr]
        assert list(restored) == list(original)


@given(LAYOUTS, st.integers(0, 30))
def test_ranks_of_one_data_coordinate_share_one_object(layout: Layout, rows: int) -> None:
    distribution = THREE_D.distribute(layout, Arguments((numbers(rows),)), Split())
    for group in layout.groups("pp", "cp", "tp"):
        assert len({id(distribution.arguments[rank]) for rank in group}) == 1


@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 9))
def test_balance_within_labels(parts: int, rows: int, seed: int) -> None:
    batch = numbers(rows, seed, longest=50)
    cut = cut_rows(batch, parts, Split(balance="test_length", within="test_label"))
    assert sorted(np.concatenate(cut).tolist()) == list(range(rows))
    lengths, labels = batch.tensor("test_length").numpy(), batch.tensor("test_label").numpy()
    for label in range(3):
        sums = [lengths[part][labels[part] == label].sum() for part in cut]
        assert max(sums) - min(sums) <= 50, "parts of one label differ by more than one longest row"


def test_rows_of_one_prompt_stay_near_each_other_as_long_as_parts_are_even() -> None:
    lengths, prompts = torch.tensor([10, 11, 9, 10] * 4), torch.arange(4).repeat_interleave(4)
    batch = Batch.of(test_length=lengths, test_group=prompts)
    near = Split(balance="test_length", near="test_group")
    halves = cut_rows(batch, 2, near)
    assert all(len(part) == 8 and len(set(prompts[part].tolist())) == 2 for part in halves)
    # Three parts of four prompts would be uneven: the prompts are halved or quartered.
    even = max(
        int(lengths[part].sum()) for part in cut_rows(batch, 3, Split(balance="test_length"))
    )
    assert max(int(lengths[part].sum()) for part in cut_rows(batch, 3, near)) <= 1.1 * even
    alone = Batch.of(test_length=torch.tensor([7, 7]), test_group=torch.zeros(2, dtype=torch.int64))
    assert [len(part) for part in cut_rows(alone, 2, near)] == [1, 1]


def test_who_is_collected() -> None:
    layout = Layout.of(dp=2, pp=2, tp=2)
    assert list(THREE_D.collected(layout)) == [2, 6]
    assert list(THREE_D_PP_ONLY.collected(layout)) == [0, 2]
    assert list(DP.collected(layout)) == list(ONE_TO_ALL.collected(layout)) == list(range(8))
    assert set(PROTOCOLS) == {
        "ONE_TO_ALL",
        "3D_PROTO",
        "3D_ALL_MICRO_DP",
        "3D_PP_ONLY",
        "DP_PROTO",
        "ALL_TO_ALL",
    }


def test_wrong_inputs_are_named() -> None:
    layout = Layout.of(dp=2)
    with pytest.raises(ValueError, match="3 elements; give one for each of 2 ranks"):
        ALL_TO_ALL.distribute(layout, Arguments(([1, 2, 3],)), Split())
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\]"):
        DP.distribute(layout, Arguments((numbers(2), numbers(3))), Split())
    with pytest.raises(ValueError, match="no batch"):
        DP.distribute(layout, Arguments((1,)), Split())
    assert isinstance(
        DP.distribute(layout, Arguments((numbers(2), "same")), Split()).arguments[1].args[0], Batch
    )
