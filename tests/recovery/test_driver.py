"""The driver of a recovery over the real loop, with pools and a role that only count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from controllers.data import DataConfig, RowLoader
from controllers.loop import Loop, Outcome
from controllers.loop_config import LoopConfig
from controllers.recovery import Driver
from hybridflow.batch import Batch
from hybridflow.checkpoint import CheckpointStore
from hybridflow.errors import Where, WorkerDied, WorkerError, WorkerValueError
from hybridflow.failures import EventLog
from hybridflow.local_pool import LocalPool
from hybridflow.metrics import MetricsConfig, Tracker, read_jsonl
from hybridflow.pool import Parts
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.results import Metrics
from tests.controllers.test_loop import BATCH, FakeActor, FakeAlgorithm, dataset


class CountedPool(LocalPool):
    """A pool whose restart costs the actor its weight."""

    def __init__(self, actor: FakeActor) -> None:
        super().__init__()
        self.actor = actor
        self.num_restarts = 0

    def restarting(self) -> Parts:
        self.num_restarts += 1
        self.broken = ""
        self.actor.weight = 0
        yield


@dataclass
class Failing(FakeAlgorithm):
    """Raises the next of `errors` at steps that it names, instead of training."""

    errors: dict[int, list[Exception]] = field(default_factory=dict)

    def step(self, prompts: Batch) -> Metrics:
        planned = self.errors.get(self.actor.weight + 1, [])
        if planned:
            self.actor.weight += 7  # a half-finished update
            raise planned.pop(0)
        return super().step(prompts)


def died(step: int, pool: str = "main") -> WorkerDied:
    where = Where(role="actor", rank=1, method="update_actor", pool=pool)
    return WorkerDied(
        f"actor rank 1 died in update_actor (pid {100 + step} on here): signal 9", (where,)
    )


def raised(kind: type[WorkerError] = WorkerError) -> WorkerError:
    where = Where(role="actor", rank=0, method="update_actor")
    return kind(where, "RuntimeError: at 0x7f3a", "the remote traceback")


@dataclass
class Life:
    outcome: Outcome | None
    pools: dict[str, CountedPool]
    rejoined: list[set[str]]
    actor: FakeActor
    loop: Loop
    driver: Driver


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., Life]:
    def run(errors: dict[int, list[Exception]], max_restarts: int = 3, **settings: Any) -> Life:
        actor = FakeActor()
        algorithm = Failing(actor, errors=errors)
        loader = RowLoader(dataset(), DataConfig(train="by hand", batch_size=BATCH, seed=3))
        config = LoopConfig(num_steps=5, checkpoint_every=2, **settings)
        pools = {"main": CountedPool(actor), "other": CountedPool(FakeActor())}
        rejoined: list[set[str]] = []
        with Tracker(MetricsConfig(console=False), tmp_path, total_steps=5) as tracker:
            loop = Loop(
                algorithm,
                trained={"actor": actor},  # type: ignore[dict-item]
                data=loader,
                validate=None,
                tracker=tracker,
                store=CheckpointStore(tmp_path / "checkpoints", keep_last=100),
                config=config,
            )
            driver = Driver(
                loop,
                pools=pools,
                rejoin=lambda restarted: rejoined.append(set(restarted)),
                config=RecoveryConfig(max_restarts=max_restarts),
                events=EventLog(tmp_path, attempt=4) if max_restarts else None,
            )
            outcome = driver.run()
        return Life(outcome, pools, rejoined, actor, loop, driver)

    return run


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (directory / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_a_death_goes_back_to_the_newest_commit(live: Callable[..., Life], tmp_path: Path) -> None:
    """C4: only the failed pool is restarted; steps 3 and 4 are trained once more or for the first
    time, and stand in metrics.jsonl once; the lost line is in lost/ (R9)."""
    life = live({4: [died(4)]})
    assert life.actor.weight == 5 and life.outcome is not None and life.outcome.num_steps == 5
    assert (life.pools["main"].num_restarts, life.pools["other"].num_restarts) == (1, 0)
    assert life.rejoined == [{"main"}]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in read_jsonl(tmp_path / "lost" / "attempt-4.jsonl")] == [3]
    (failure,) = events(tmp_path, "failure")
    expected = {"kind": "died", "pool": "main", "role": "actor", "rank": 1, "step": 4}
    assert {name: failure[name] for name in expected} == expected
    assert "pid" not in failure["cause"] and "pid 104" in failure["evidence"]
    (recovered,) = events(tmp_path, "recovered")
    assert (recovered["step"], recovered["lost_steps"]) == (2, 2)
    assert life.outcome.tokens == 5 * 100.0, "the lost step does not count twice"


def test_a_recovery_is_counted_and_stands_in_the_trace(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    """FAULTS C11: the numbers that Prometheus gets, and a failure with its recovery on the lane of
    the controller, between the steps."""
    life = live({4: [died(4)]})
    vitals = life.driver.vitals.values
    assert (vitals["starts"], vitals["failures"], vitals["recoveries"]) == (1, 1, 1)
    (recovered,) = events(tmp_path, "recovered")
    assert vitals["recovery_seconds"] == recovered["total_s"]
    assert (vitals["lost_steps"], vitals["step"], vitals["durable_step"]) == (2, 5, 5)
    trace = json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")
    spans = [event for event in trace if event["ph"] == "X"]
    loop = [event for event in spans if event["name"].startswith(("step", "recovery"))]
    loop.sort(key=lambda event: int(event["ts"]))
    names = [event["name"] for event in loop]
    assert names == ["step 1", "step 2", "step 3", "recovery", "step 3", "step 4", "step 5"]
    for earlier, later in pairwise(loop):
        assert earlier["ts"] + earlier["dur"] <= later["ts"]
    (failure,) = (event for event in trace if event["ph"] == "i")
    assert failure["name"] == "actor died" and failure["args"]["rank"] == 1


def test_without_a_commit_everything_is_built_anew(live: Callable[..., Life]) -> None:
    life = live({2: [died(2)]})
    assert life.actor.weight == 5
    assert [pool.num_restarts for pool in life.pools.values()] == [1, 1]


def test_the_same_exception_twice_ends_the_run(live: Callable[..., Life], tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="RuntimeError: at 0x7f3a"):
        live({4: [raised(), raised(), raised()]})
    assert len(events(tmp_path, "failure")) == 2 and len(events(tmp_path, "recovered")) == 1


def test_the_budget_counts_restarts_without_progress(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    life = live({3: [died(3)] * 2, 5: [died(5)] * 2}, max_restarts=2)
    assert life.actor.weight == 5 and len(events(tmp_path, "recovered")) == 4


def test_a_spent_budget_raises_the_last_failure(live: Callable[..., Life], tmp_path: Path) -> None:
    with pytest.raises(WorkerDied):
        live({3: [died(3), died(3), died(3)]}, max_restarts=2)
    assert "restarts without a new step" in events(tmp_path, "failure")[-1]["gives_up"]


def test_a_users_mistake_is_never_tried_again(live: Callable[..., Life]) -> None:
    with pytest.raises(WorkerValueError):
        live({3: [raised(WorkerValueError)]})


def test_no_restarts_is_the_error_itself(live: Callable[..., Life], tmp_path: Path) -> None:
    with pytest.raises(WorkerDied):
        live({3: [died(3)]}, max_restarts=0)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_failure_during_a_recovery_starts_it_over(
    live: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = FakeActor.load_checkpoint, []

    def load_checkpoint(self: FakeActor, directory: str) -> None:
        calls.append(directory)
        if len(calls) == 1:
            raise died(0, pool="other")
        load(self, directory)

    monkeypatch.setattr(FakeActor, "load_checkpoint", load_checkpoint)
    life = live({4: [died(4)]})
    assert life.actor.weight == 5 and len(calls) == 2
    assert (life.pools["main"].num_restarts, life.pools["other"].num_restarts) == (1, 1)
