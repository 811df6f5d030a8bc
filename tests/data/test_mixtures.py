"""Several sources of data, with weights or without, and rows that are left out: duplicates, and
prompts by their pass rate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controllers.data import DataConfig, RowLoader
from controllers.data.mixture import random_keys
from controllers.run_length import RunLength
from tests.data.kinds import make
from tests.data.rows import ROWS, answers, lines, load, row_of


def test_exact_duplicates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([*ROWS, *ROWS[:2], row_of(prompt="1+1=")]))
    assert len(load(tmp_path / "a.jsonl")) == 8
    caplog.clear()
    assert len(load(tmp_path / "a.jsonl", remove_duplicates=True)) == 6
    assert "dropped 2 of 8: 2 that equal an earlier one" in caplog.text


@pytest.fixture
def mixed(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(prompt=f"a{n}") for n in range(10)]))
    (tmp_path / "b.jsonl").write_bytes(lines([row_of(prompt=f"b{n}") for n in range(30)]))
    return [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl")}]


@pytest.mark.parametrize("shuffle", [False, True])
def test_sources_with_weights(mixed: list[dict[str, Any]], shuffle: bool) -> None:
    """Of every epoch of 40 rows 30 are a's and 10 b's; each row of a source is used as often as
    its others; the stream goes on where a checkpoint stood."""
    tokenizer = make("byte_level")
    dataset = load(mixed, tokenizer=tokenizer)
    config = DataConfig(train=mixed, batch_size=7, shuffle=shuffle, seed=5)
    loader, uses, uids = RowLoader(dataset, config), [], []
    length = RunLength.of(num_steps=None, num_epochs=3, num_rows=len(dataset), batch_size=7)
    states = []
    while not length.reached(0, loader.position):
        states.append(loader.state_dict())
        batch = loader.take(length.next_rows(loader.position))
        uses += [tokenizer.decode(ids) for ids in batch.ragged("prompt_ids").unbind()]
        uids += batch.tensor("uid").tolist()
    assert len(uses) == 120 and len(set(uids)) == 120
    for epoch in range(3):
        firsts = Counter(use[0] for use in uses[40 * epoch : 40 * epoch + 40])
        assert firsts == {"a": 30, "b": 10}
    counts = Counter(uses)
    assert {counts[f"a{n}"] for n in range(10)} == {9}
    assert {counts[f"b{n}"] for n in range(30)} == {1}
    resumed = RowLoader(dataset, config)
    resumed.load_state_dict(states[9])
    assert [tokenizer.decode(ids) for ids in next(resumed).ragged("prompt_ids").unbind()] == (
        uses[63:70]
    )
    again = RowLoader(dataset, DataConfig(train=mixed, batch_size=120, shuffle=shuffle, seed=5))
    assert next(again).tensor("uid").tolist() == uids
    with pytest.raises(ValueError, match=r"the sources of data\.train have the weights"):
        resumed.load_state_dict(states[9] | {"weights": [1.0, 1.0]})


def test_sources_without_weights_follow_each_other(mixed: list[dict[str, Any]]) -> None:
    plain = [source["path"] for source in mixed]
    dataset = load(plain)
    assert len(dataset) == 40 and not dataset.shares
    assert RowLoader(dataset, DataConfig(train=plain, shuffle=False)).order(0).tolist() == list(
        range(40)
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"path": "a", "weight": 0}], "weight 0"),
        ([{"path": "a", "weight": "much"}], "weight 'much'"),
        ([{"path": "a", "wieght": 1}], "'wieght'"),
        ([{"weight": 1}], r"data\.train is"),
        ([], r"data\.train is \[\]"),
    ],
)
def test_mistakes_in_sources(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(train=value)


def test_an_empty_source_with_a_weight(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl' has no rows that are used"):
        load([*mixed, str(tmp_path / "empty.jsonl")])


def test_pass_rates_filter_the_prompts_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    rates = [0.0, 0.1, 0.5, 0.9, 1.0]
    places = [f"{tmp_path}/a.jsonl, line {n + 1}" for n in range(5)]
    measured = [{"place": p, "pass_rate": r} for p, r in zip(places, rates, strict=True)]
    (tmp_path / "rates.jsonl").write_bytes(lines(measured))
    options = {"pass_rate": [0.1, 0.9], "pass_rates": str(tmp_path / "rates.jsonl")}
    assert answers(load(tmp_path / "a.jsonl", **options)) == ["4", "6", "8"]
    assert "dropped 2 of 5: 2 with a pass rate outside data.pass_rate" in caplog.text
    assert len(load(tmp_path / "a.jsonl", field="data.validation", **options)) == 5
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: data\.pass_rates=.* has no pass rate"):
        load(tmp_path / "b.jsonl", **options)
    with pytest.raises(ValueError, match="set both"):
        DataConfig(train="a", pass_rate=[0.1, 0.9])
    with pytest.raises(ValueError, match="lowest and the highest"):
        DataConfig(train="a", pass_rate=[0.9, 0.1], pass_rates="x")
    with pytest.raises(ValueError, match="which does not exist"):
        load(tmp_path / "a.jsonl", **(options | {"pass_rates": "nowhere"}))


def test_random_numbers_of_shuffles_stay_the_same() -> None:
    """The order of epochs of data without weights, as checkpoints of earlier versions have it."""
    expected = np.random.Philox(key=np.array([7, 2], dtype=np.uint64)).random_raw(5)
    assert random_keys((7, 2), 5).tolist() == expected.tolist()
