"""Asynchronous runs at the edges of their settings, in one process: whatever they are, every row is
trained on once, within the bound, and the run ends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from controllers.window import Window
from tests.asynchrony.runs import TRUNCATE, Record, drive, tiny_settings
from tests.tiny import VOCAB, make_data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One step ahead, over one epoch of 16 rows."""
    settings = tiny_settings(tmp_path_factory.mktemp("odd")) | TRUNCATE
    return settings | {
        "asynchrony.staleness": 1,
        "asynchrony.look_ahead": 1.0,
        "loop.num_epochs": 1,
        "loop.num_steps": None,
    }


SLOW = pytest.mark.slow
AT_ONCE = {"actor.generation.sampling.stop_token_ids": list(range(VOCAB))}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(AT_ONCE, id="responses of one token"),
        pytest.param({"data.batch_size": 1}, id="one prompt a step"),
        pytest.param({"data.batch_size": 3}, id="a last step of one prompt"),
        pytest.param({"asynchrony.staleness": 20, "data.batch_size": 8}, id="all rows at once"),
        pytest.param({"actor.generation.max_num_seqs": 1}, id="one response at a time", marks=SLOW),
        pytest.param({"asynchrony.slice_steps": 1000}, id="slices to the end", marks=SLOW),
        pytest.param({"asynchrony.look_ahead": 1000.0}, id="a window without an end", marks=SLOW),
        pytest.param(
            {"asynchrony.in_flight": "drain", "data.batch_size": 3}, id="drain, a last short step"
        ),
    ],
)
def test_every_row_once_within_the_bound(
    tiny: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = tiny | changes
    size = settings["data.batch_size"]
    num_steps = -(-16 // size)
    record = drive(settings, tmp_path / "run", num_steps=num_steps)
    assert record.positions == [min(16, (step + 1) * size) for step in range(num_steps)]
    assert Counter(record.rows) == {str(row): 2 for row in range(16)}
    bound = Window(
        groups_per_step=size,
        staleness=settings["asynchrony.staleness"],
        look_ahead=settings["asynchrony.look_ahead"],
    ).bound
    assert max(step["staleness/max"] for step in record.metrics) <= min(bound, num_steps - 1)


@pytest.mark.parametrize(
    ("in_flight", "staleness"),
    [
        ("recompute", (3, 1)),
        ("drain", (3, 1)),
        pytest.param("recompute", (1, 3), marks=SLOW),
        pytest.param("drain", (1, 3), marks=SLOW),
    ],
)
def test_a_run_goes_on_with_another_staleness(
    tiny: dict[str, Any], tmp_path: Path, in_flight: str, staleness: tuple[int, int]
) -> None:
    """A checkpoint of more prompts under way than the run may have now, or fewer: the bound is that
    of the present settings, and no row is lost or doubled."""
    settings = tiny | {"asynchrony.in_flight": in_flight, "asynchrony.staleness": staleness[0]}
    record = drive(settings, tmp_path / "run", num_steps=3, stops=True)
    settings["asynchrony.staleness"] = staleness[1]
    if in_flight == "recompute":
        settings["asynchrony.look_ahead"] = 0.0
    drive(settings, tmp_path / "run", num_steps=8, record=record)
    assert Counter(record.rows) == {str(row): 2 for row in range(16)}
    assert max(step["staleness/max"] for step in record.metrics[3:]) <= staleness[1]


def test_a_validation_after_every_step_disturbs_nothing(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    """F12, 13, in a run: it is drawn by the newest weights, between two slices, and what is in
    flight goes on."""
    settings = tiny | {"data.validation": make_data(tmp_path / "held_out.jsonl", rows=3, seed=9)}
    record = Record()
    drive(settings, tmp_path / "run", num_steps=8, record=record, validates=True)
    trained = [row for step in range(8) for row in record.rows[7 * step : 7 * step + 4]]
    assert Counter(trained) == {str(row): 2 for row in range(16)}
    assert all("validation/reward/mean" in step for step in record.metrics)


def test_a_reward_that_raises_while_rows_stream(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The step is taken again: what was in flight is drawn anew, and every row is trained on
    once."""
    record = Record(fails_at=6)
    drive(tiny, tmp_path / "run", num_steps=8, record=record, retries=1)
    assert record.positions == [2, 4, 6, 8, 10, 12, 14, 16]
    assert set(record.rows) == {str(row) for row in range(16)}
    assert len(record.rows) == 32 + 2, "the two rewards before the failure"
