"""Batch: metadata operations against plain Python lists, in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.batch import Batch
from hybridflow.columns import Block, Ragged, declare
from tests.runtime.workers import numbers


def rows_of(batch: Batch) -> list[tuple[list[int], int, str]]:
    """The batch as plain rows."""
    ids = [row.tolist() for row in batch.ragged("test_ids").unbind()]
    lengths, texts = batch.tensor("test_length").tolist(), batch["test_text"]
    return list(zip(ids, lengths, texts, strict=True))  # type: ignore[arg-type]


COLUMNS = ("test_ids", "test_length", "test_text")


@given(st.integers(0, 12), st.data())
def test_operations_equal_those_on_lists(rows: int, data: st.DataObject) -> None:
    batch = numbers(rows).select(*COLUMNS)
    plain = rows_of(batch)
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["reorder", "rows", "split_concat", "repeat", "local"]))
        if kind == "reorder":
            order = data.draw(st.permutations(range(len(plain))))
            batch, plain = batch.reorder(np.array(order, dtype=np.int64)), [plain[i] for i in order]
        elif kind == "rows" and plain:
            index = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=6))
            batch, plain = batch.rows(np.array(index, dtype=np.int64)), [plain[i] for i in index]
        elif kind == "split_concat":
            parts = batch.split(data.draw(st.integers(1, 5)))
            turned = data.draw(st.permutations(range(len(parts))))
            cut = np.array_split(np.arange(len(plain)), len(parts))
            batch = Batch.concat([parts[i] for i in turned])
            plain = [plain[row] for i in turned for row in cut[i]]
        elif kind == "repeat" and len(plain) < 20:
            times = data.draw(st.integers(1, 3))
            batch = batch.repeat(times).drop("sample")
            plain = [row for row in plain for _ in range(times)]
        elif kind == "local":
            batch = batch.local(COLUMNS)
        assert len(batch) == len(plain)
        assert rows_of(batch) == plain


def test_repeat_numbers_the_samples() -> None:
    assert numbers(2).repeat(3).tensor("sample").tolist() == [0, 1, 2, 0, 1, 2]


def test_mask_selects_rows() -> None:
    batch = numbers(5)
    assert batch.rows(np.array([True, False, True, False, False])).tensor(
        "test_length"
    ).tolist() == [
        batch.tensor("test_length")[0],
        batch.tensor("test_length")[2],
    ]


def test_union_needs_different_names_and_equal_rows() -> None:
    batch = numbers(3)
    with pytest.raises(ValueError, match=r"'test_length'.*in both"):
        batch | numbers(3).select("test_length")
    with pytest.raises(ValueError, match=r"3 rows . 4 rows"):
        batch.select("test_ids") | numbers(4).select("test_length")
    assert (batch.select("test_ids") | batch.select("test_length", "test_ids")).columns == (
        "test_ids",
        "test_length",
    )


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"'test_length'.*declared int64.*float"):
        Batch.of(test_length=torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"'test_ids'.*Ragged"):
        Batch.of(test_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="different numbers of rows"):
        Batch.of(test_length=[1, 2], test_text=["a"])
    with pytest.raises(ValueError, match="'nobody' is not declared"):
        Batch.of(nobody=[1])
    with pytest.raises(ValueError, match="no column 'test_rank'"):
        numbers(1)["test_rank"]
    with pytest.raises(ValueError, match="declared twice"):
        declare("test_length", "batch", "float32", "another meaning")
    with pytest.raises(ValueError, match=r"rows 0..7 of a batch of 3"):
        numbers(3).rows([0, 7])
    with pytest.raises(ValueError, match="exactly once"):
        numbers(3).reorder([0, 0, 2])


def test_rename_keeps_the_data_and_checks_the_kind() -> None:
    batch = numbers(3)
    assert (
        batch.rename(test_length="test_rank").tensor("test_rank").tolist()
        == batch.tensor("test_length").tolist()
    )
    with pytest.raises(ValueError, match="differ in dims or dtype"):
        batch.rename(test_ids="test_rank")


def test_consecutive_rows_are_views() -> None:
    block = Block.of("test_ids", Ragged.of([[1, 2], [3], [4, 5, 6]]))
    assert np.shares_memory(block.rows(np.array([1, 2])).data, block.data)
    assert not np.shares_memory(block.rows(np.array([0, 2])).data, block.data)


def test_bfloat16_round_trip() -> None:
    values = torch.tensor([1.5, -2.25, 3e38]).bfloat16()
    value = Batch.of(test_half=Ragged(values, torch.tensor([2, 1]))).ragged("test_half")
    assert value.values.dtype is torch.bfloat16
    assert torch.equal(value.values, values)
