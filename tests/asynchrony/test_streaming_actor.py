"""The calls of StreamingActor in their order, and the times that its metrics are shares of."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.roles import EndedRow, Progress, RowName
from workers.streaming_actor import StreamingActor


class Generator:
    """Draws every row in its first slice."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._rows: list[RowName] = []

    def submit(self, rows: Batch, *, do_sample: bool) -> None:
        self.calls.append("submit")
        uids, samples = rows.tensor("uid").tolist(), rows.tensor("sample").tolist()
        self._rows += [
            RowName(uid, sample, not do_sample) for uid, sample in zip(uids, samples, strict=True)
        ]

    def advance(self, limit: int) -> Progress:
        self.calls.append("advance")
        ended, self._rows = tuple(EndedRow(name, 0, 0) for name in self._rows), []
        return Progress(finished=ended, num_steps=limit, seconds=0.02)

    def collect(self, rows: Batch, *, do_sample: bool) -> Batch:
        self.calls.append("collect")
        return rows


def rows(*uids: int) -> Batch:
    return Batch.of(uid=torch.tensor(uids), sample=torch.zeros(len(uids), dtype=torch.int64))


@pytest.fixture
def generator() -> Generator:
    return Generator()


@pytest.fixture
def actor(generator: Generator) -> StreamingActor:
    trainer: Any = SimpleNamespace(
        update_actor=lambda batch: Metrics({"actor/weight_version": 0.0}),
        current_version=lambda: 0,
    )
    made: Any = generator
    actor = StreamingActor(trainer, made)
    actor._sync = Metrics()
    actor.submit(rows(0))
    actor.wait()
    assert actor.poll() == [0]
    return actor


def test_finished_rows_are_asked_for_before_anything_waits(
    actor: StreamingActor, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.submit(rows(1))
    # Reading the version waits for the trainer, and a wait keeps slices going.
    monkeypatch.setattr(actor, "current_version", lambda: len(actor.poll()))
    generator.calls.clear()
    actor.generate_sequences(rows(0))
    assert generator.calls[0] == "collect"
    assert "advance" in generator.calls


def test_idle_shares_are_of_the_time_up_to_the_update(actor: StreamingActor) -> None:
    metrics = actor.update_actor(rows(0))
    time.sleep(0.1)  # as long as the update takes until its metrics are read
    idle = dict(metrics)["asynchrony/generator_idle"]
    actor.submit(rows(1))
    actor.wait()
    actor.poll()
    time.sleep(0.02)
    later = dict(actor.update_actor(rows(0)))["asynchrony/generator_idle"]
    # 20 ms of work in the fixture, in far less than the sleep: not idle at all.
    assert idle == 0
    # 20 ms of work in the 120 ms and more since the first update.
    assert 0.5 < later < 1


def test_rows_that_were_given_up_are_not_stale(
    actor: StreamingActor, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows of versions 0, 4 and 2 that train version 4, the first was given up."""
    versions = {0: (0, 0), 1: (4, 4), 2: (2, 3)}
    reasons = {0: "failed", 1: "stop", 2: "stop"}

    def collect(chosen: Batch, *, do_sample: bool) -> Batch:
        uids = chosen.tensor("uid").tolist()
        return chosen | Batch.of(
            finish_reason=[reasons[uid] for uid in uids], episode_metrics=[{} for _ in uids]
        )

    monkeypatch.setattr(generator, "collect", collect)
    monkeypatch.setattr(actor, "current_version", lambda: 4)
    actor.bound = 4
    for uid, of_row in versions.items():
        actor._versions[RowName(uid, 0, False)] = of_row
        actor._replica[RowName(uid, 0, False)] = 0
    actor.generate_sequences(rows(0, 1, 2))
    metrics = dict(actor.update_actor(rows(1, 2)))
    assert metrics["staleness/mean"] == 1.0 and metrics["staleness/max"] == 2.0
    assert metrics["staleness/newest_mean"] == 0.5 and metrics["staleness/versions_per_row"] == 1.5
