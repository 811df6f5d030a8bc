"""The stream of prompts: nothing lost, nothing twice, and the same from any point on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from controllers.data import DataConfig, PromptDataset, RowLoader
from hybridflow.batch import Batch


def made_of(num_rows: int, name: str = "fingerprint") -> PromptDataset:
    """Row i: the token i, answer i."""
    columns = [json.dumps({"answer": i}).encode() for i in range(num_rows)]
    ends = np.cumsum([len(part) for part in columns])
    return PromptDataset(
        np.arange(num_rows, dtype=np.int32),
        np.arange(1, num_rows + 1),
        np.frombuffer(b"".join(columns), np.uint8),
        ends,
        name,
    )


def loader(num_rows: int, batch_size: int, **settings: object) -> RowLoader:
    config = DataConfig(batch_size=batch_size, **settings)  # type: ignore[arg-type]
    return RowLoader(made_of(num_rows), config)


def uids(batch: Batch) -> np.ndarray:
    return batch.tensor("uid").numpy()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 23),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_every_epoch_has_every_row_once(
    num_rows: int, batch_size: int, seed: int, shuffle: bool
) -> None:
    prompts = loader(num_rows, batch_size, seed=seed, shuffle=shuffle)
    batches = [next(prompts) for _ in range(-(-4 * num_rows // batch_size))]
    assert all(len(batch) == batch_size for batch in batches)
    uid = np.concatenate([uids(batch) for batch in batches])
    for epoch in range(4):
        assert sorted(uid[epoch * num_rows : (epoch + 1) * num_rows]) == list(
            range(epoch * num_rows, (epoch + 1) * num_rows)
        )
    for batch in batches:
        rows = (uids(batch) % num_rows).tolist()
        assert [ids.tolist() for ids in batch.ragged("prompt_ids").unbind()] == [
            [row] for row in rows
        ]
        assert [extras["answer"] for extras in batch.objects("extras")] == rows


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 23),
    before=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_resumed_stream_goes_on(num_rows: int, before: int, sizes: tuple[int, int]) -> None:
    """Through JSON, into a new loader, even with another batch size: the same stream of uids."""
    first = loader(num_rows, sizes[0], seed=3)
    given_out = [uids(next(first)) for _ in range(before)]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(num_rows, sizes[1], seed=3)
    resumed.load_state_dict(state)
    assert resumed.epoch == before * sizes[0] / num_rows
    stream = np.concatenate([*given_out, uids(next(resumed)), uids(next(resumed))])
    whole = loader(num_rows, len(stream), seed=3)
    assert stream.tolist() == uids(next(whole)).tolist()


def test_order_is_shuffled_by_seed_and_epoch() -> None:
    orders = [
        tuple(loader(50, 1, seed=seed).order(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4 and tuple(range(50)) not in orders
    assert loader(50, 1, shuffle=False).order(7).tolist() == list(range(50))
    assert loader(6, 1, seed=0).order(0).tolist() == [0, 2, 1, 5, 4, 3], (
        "the order of a seed must never change"
    )


def test_positions_spread_evenly() -> None:
    """Row 0 lands everywhere: mean position over 400 epochs within 4 standard errors of the
    middle."""
    prompts = loader(101, 1)
    where = [int(np.flatnonzero(prompts.order(epoch) == 0)[0]) for epoch in range(400)]
    assert abs(np.mean(where) - 50) < 4 * np.sqrt((101**2 - 1) / 12 / 400)


def test_other_data_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    state = loader(9, 4, seed=1).state_dict()
    with pytest.raises(
        ValueError, match=r"had 9 rows and fingerprint fingerprint.*this one has 9 and other"
    ):
        RowLoader(made_of(9, "other"), DataConfig(batch_size=4, seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.seed is 2.*Set data\.seed=1"):
        loader(9, 4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.shuffle is False.*Set data\.shuffle=True"):
        loader(9, 4, seed=1, shuffle=False).load_state_dict(state)


def test_rows_out_of_range() -> None:
    with pytest.raises(ValueError, match="rows 2 to 5 asked for; the dataset has 0 to 4"):
        made_of(5).rows([2, 5])
