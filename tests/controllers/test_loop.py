"""The outer loop with hand-written roles, a real loader, tracker and checkpoint store: cadence,
resume, early end, phase seconds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controllers.algorithm_base import AlgorithmConfig
from controllers.data import DataConfig, PromptDataset, RowLoader
from controllers.loop import Loop, Outcome, phase_seconds
from controllers.loop_config import LoopConfig
from controllers.recovery import Driver
from controllers.validation import REWARD, ResponseReward
from hybridflow.batch import Batch
from hybridflow.calls import CallRecord
from hybridflow.checkpoint import CheckpointStore
from hybridflow.metrics import MetricsConfig, Tracker, read_jsonl
from hybridflow.results import Metrics
from hybridflow.waiting import CALLS
from workers.generation.config import SamplingConfig

NUM_ROWS = 10
BATCH = 4


def dataset(num_rows: int = NUM_ROWS) -> PromptDataset:
    """Prompt i is the tokens [i, i]; its further columns are {"answer": "i"}."""
    columns = [json.dumps({"answer": str(i)}).encode() for i in range(num_rows)]
    ends = np.cumsum([len(column) for column in columns])
    tokens = np.repeat(np.arange(num_rows, dtype=np.int32), 2)
    return PromptDataset(
        tokens,
        2 * np.arange(1, num_rows + 1),
        np.frombuffer(b"".join(columns), dtype=np.uint8),
        ends,
        "made by hand",
    )


@dataclass
class FakeActor:
    """Its only weight counts the updates."""

    weight: int = 0
    validations: list[tuple[int, SamplingConfig | None]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)

    def generate_sequences(self, prompts: Batch, sampling: SamplingConfig | None = None) -> Batch:
        self.validations.append((len(prompts), sampling))
        return Batch.of(finish_reason=["stop"] * len(prompts))

    def try_checkpoint(self, directory: str) -> str:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "weight").write_text(str(self.weight))
        return ""

    def load_checkpoint(self, directory: str) -> None:
        self.weight = int((Path(directory) / "weight").read_text())

    def export_model(self, directory: str) -> str:
        Path(directory).mkdir()
        (Path(directory) / "config.json").write_text("{}")
        return ""


@dataclass
class FakeReward:
    """A tenth of the actor's weight, for every response."""

    actor: FakeActor

    def compute_reward(self, batch: Batch) -> Batch:
        assert batch.objects("extras")[0] == {"answer": "0"}
        return Batch.of(rewards=torch.full((len(batch),), self.actor.weight / 10))


@dataclass
class FakeAlgorithm:
    actor: FakeActor
    config: AlgorithmConfig = field(default_factory=lambda: AlgorithmConfig(samples_per_prompt=2))
    uids: list[list[int]] = field(default_factory=list)
    number: float = 0.0
    fail_at: int = 0

    def step(self, prompts: Batch) -> Metrics:
        assert prompts.tensor("sample").tolist() == [0, 1] * (len(prompts) // 2)
        if self.fail_at == self.actor.weight + 1:
            raise RuntimeError("the machine died")
        self.uids.append(prompts.tensor("uid").tolist()[::2])
        self.actor.weight += 1
        self.number += 0.5
        for seconds in (2.0, 3.0):
            CALLS.records.append(
                CallRecord(
                    role="actor",
                    method="update_actor",
                    pool="main",
                    ranks=((10.0, 10.0 + seconds),),
                )
            )
        return Metrics(
            {"actor/loss": 1.0, "tokens": 100.0, "actor/log_prob_gap_max": self.actor.weight / 100}
        )

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Run:
    """One process' life: Run(tmp_path, num_steps=7).outcome"""

    def __init__(
        self,
        directory: Path,
        *,
        validation: bool = True,
        fail_at: int = 0,
        start_step: int = -1,
        **settings: Any,
    ) -> None:
        self.actor = FakeActor()
        self.algorithm = FakeAlgorithm(self.actor, fail_at=fail_at)
        self.store = CheckpointStore(directory / "checkpoints", keep_last=100, metric=REWARD)
        self.loader = RowLoader(dataset(), DataConfig(train="by hand", batch_size=BATCH, seed=3))
        config = LoopConfig(**settings)
        sampling = config.validation_sampling
        CALLS.records.clear()
        with Tracker(
            MetricsConfig(console=False),
            directory,
            total_steps=config.length(NUM_ROWS, BATCH).num_steps,
            start_step=start_step,
        ) as tracker:
            loop = Loop(
                self.algorithm,
                trained={"actor": self.actor},  # type: ignore[dict-item]
                data=self.loader,
                validate=ResponseReward(self.actor, FakeReward(self.actor), dataset(), sampling, 77)
                if validation
                else None,  # type: ignore[arg-type]
                tracker=tracker,
                store=self.store,
                config=config,
            )
            loop.resume()
            self.outcome: Outcome = Driver(loop).run()
        self.rows = read_jsonl(directory / "metrics.jsonl")

    def steps(self, split: str) -> list[int]:
        return [row["step"] for row in self.rows if row["split"] == split]

    @property
    def checkpoints(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.store.all()]


def test_cadence_of_validation_and_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=7, validate_every=3, checkpoint_every=2)
    assert run.steps("train") == [1, 2, 3, 4, 5, 6, 7]
    assert run.steps("validation") == [0, 3, 6, 7]
    assert run.checkpoints == [2, 4, 6, 7]
    assert (run.outcome.num_steps, run.outcome.reward_before, run.outcome.reward_after) == (
        7,
        0.0,
        pytest.approx(0.7),
    )
    assert (run.store.directory / "step-00000007" / "huggingface" / "config.json").is_file()


def test_zero_means_only_at_the_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=4, validate_every=0, checkpoint_every=0)
    assert run.steps("validation") == [0, 4] and run.checkpoints == [4]


def test_without_held_out_prompts_nothing_is_validated(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=2, validation=False)
    assert (
        run.steps("validation") == []
        and run.outcome.reward_after is None
        and run.checkpoints == [2]
    )


def test_validation_is_greedy_over_every_prompt_at_the_length_of_training(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=1)
    assert (
        run.actor.validations
        == [(NUM_ROWS, SamplingConfig(greedy=True, max_response_tokens=77))] * 2
    )


def test_the_run_ends_with_a_checkpoint_once_the_reward_is_reached(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=9, validate_every=2, stop_at_reward=0.35)
    assert run.outcome.num_steps == 4 and run.outcome.reward_after == pytest.approx(0.4)
    assert run.steps("validation") == [0, 2, 4] and run.checkpoints == [4]


def test_a_resumed_run_trains_on_what_the_undisturbed_one_would(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", num_steps=6)
    with pytest.raises(RuntimeError, match="the machine died"):
        Run(tmp_path / "cut", num_steps=6, checkpoint_every=3, fail_at=5)
    resumed = Run(tmp_path / "cut", num_steps=6, checkpoint_every=3, start_step=3)
    assert resumed.algorithm.uids == whole.algorithm.uids[3:], "the position in the data"
    assert resumed.actor.weight == whole.actor.weight == 6, "the weights"
    assert resumed.algorithm.number == whole.algorithm.number == 3.0, "the algorithm's own state"
    assert (
        resumed.outcome.reward_before == 0.0
        and resumed.outcome.reward_after == whole.outcome.reward_after
    )
    assert resumed.steps("train") == [1, 2, 3, 4, 5, 6] and resumed.checkpoints == [3, 6]


def test_every_prompt_is_used_once_an_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=5)
    used = [uid for uids in run.algorithm.uids for uid in uids]
    assert sorted(used) == list(range(2 * NUM_ROWS)), "two epochs: uid = row + epoch x rows"


def test_epochs_use_every_row_so_many_times_and_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, num_epochs=3)
    used = [uid for uids in run.algorithm.uids for uid in uids]
    assert sorted(used) == list(range(3 * NUM_ROWS))
    assert {len(uids) for uids in run.algorithm.uids[:-1]} == {BATCH}
    assert run.outcome.num_steps == math.ceil(3 * NUM_ROWS / BATCH) and run.checkpoints == [
        run.outcome.num_steps
    ]


def test_a_run_of_epochs_goes_on_in_the_middle_of_one(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", num_epochs=2)
    with pytest.raises(RuntimeError, match="the machine died"):
        Run(tmp_path / "cut", num_epochs=2, checkpoint_every=1, fail_at=4)
    resumed = Run(tmp_path / "cut", num_epochs=2, checkpoint_every=1, start_step=3)
    assert (3 * BATCH) % NUM_ROWS, "the cut is inside an epoch"
    assert resumed.algorithm.uids == whole.algorithm.uids[3:]
    longer = Run(tmp_path / "cut", num_epochs=3, start_step=resumed.outcome.num_steps)
    used = [uid for uids in longer.algorithm.uids for uid in uids]
    assert sorted(used) == list(range(2 * NUM_ROWS, 3 * NUM_ROWS)), "one more epoch"


def test_the_length_of_a_run_is_told() -> None:
    assert str(LoopConfig().length(1000, 128)) == "100 steps of 128 rows"
    assert str(LoopConfig(num_steps=7).length(1000, 128)) == "7 steps of 128 rows"
    assert str(LoopConfig(num_steps=1).length(1000, 1)) == "1 step of 1 row"
    assert str(LoopConfig(num_epochs=1).length(20, 4)) == "5 steps of 4 rows"
    assert str(LoopConfig(num_epochs=1).length(3, 4)) == "1 step of 3 rows"
    assert str(LoopConfig(num_epochs=3).length(1000, 128)) == "24 steps of 128 rows, the last of 56"


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    Run(tmp_path, num_steps=3)
    again = Run(tmp_path, num_steps=3, start_step=3)
    assert again.algorithm.uids == [] and again.outcome.num_steps == 3 and again.checkpoints == [3]
    assert (again.outcome.reward_before, again.outcome.reward_after) == (0.0, pytest.approx(0.3))


def test_resume_can_be_turned_off_or_pointed_at_a_checkpoint(tmp_path: Path) -> None:
    Run(tmp_path, num_steps=4, checkpoint_every=2)
    anew = Run(tmp_path / "anew", num_steps=1, resume="never")
    assert anew.outcome.num_steps == 1 and len(anew.algorithm.uids) == 1
    older = Run(
        tmp_path / "older",
        num_steps=4,
        resume=str(tmp_path / "checkpoints" / "step-00000002"),
        start_step=2,
    )
    assert len(older.algorithm.uids) == 2 and older.actor.weight == 4


def test_seconds_tokens_and_the_gap_are_summed_up(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=3, validate_every=1)
    assert run.outcome.phase_s == {"actor.update_actor": 15.0}
    assert run.outcome.tokens == 300.0 and run.outcome.largest == {"actor/log_prob_gap_max": 0.03}
    step = run.rows[1]
    assert step["seconds/actor.update_actor"] == 5.0 and "tokens" not in step
    assert step["tokens_per_s"] == pytest.approx(100 / step["seconds/step"])
    assert run.outcome.train_s == pytest.approx(
        sum(row["seconds/step"] for row in run.rows if row["split"] == "train")
    )


def test_phases_of_one_name_are_added() -> None:
    records = [
        CallRecord(role=role, method=method, pool="main", ranks=((1.0, 1.0), (1.0, end)))
        for role, method, end in CALLS_OF_A_STEP
    ]
    assert phase_seconds(records) == {"actor.generate_sequences": 3.0, "reward.compute_reward": 0.5}


CALLS_OF_A_STEP = [
    ("actor", "generate_sequences", 2.0),
    ("reward", "compute_reward", 1.5),
    ("actor", "generate_sequences", 3.0),
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_steps", 0, "use at least 1"),
        ("keep_last", 0, "use at least 1"),
        ("validate_every", -1, "use 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"loop\.{field} is {value}; {message}"):
        LoopConfig(**{field: value})
