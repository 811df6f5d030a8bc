"""Roles written by hand: they note what each call is given and answer with fixed numbers. No Ray,
no model.

A fake sees only the columns that the real method declares, so a page that relies on more fails here
as it would in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from controllers.streams import EmptyStream, Stream
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.worker import Worker, remote_methods
from workers.generation.config import SamplingConfig
from workers.losses.config import DPOLossConfig
from workers.roles import Actor, Cost, Critic, Reference, Reward


@dataclass
class Script:
    """What the models answer, row by row; call after call goes on where the last one ended, and
    then from the start."""

    responses: list[list[int]]
    rewards: list[float]
    values: list[list[float]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    ref_log_probs: list[list[float]] = field(default_factory=list)
    costs: list[float] = field(default_factory=lambda: [0.0])


@dataclass
class Seen:
    """One call: "actor.update_actor" and the declared columns that it got."""

    name: str
    batch: Batch
    do_sample: bool = True


class Log(list[Seen]):
    """The calls in order."""

    @property
    def names(self) -> list[str]:
        return [seen.name for seen in self]

    def last(self, name: str) -> Batch:
        return next(seen.batch for seen in reversed(self) if seen.name == name)


class Fake:
    def __init__(self, role: str, log: Log, script: Script) -> None:
        self.role, self.log, self.script = role, log, script
        self.answered: dict[str, int] = {}

    def note(self, role: type[Worker], method: str, batch: Batch) -> Batch:
        declared = remote_methods(role)[method]
        missing = [name for name in declared.reads if name not in batch]
        assert not missing, f"{method} lacks {missing}"
        seen = batch.select(
            *(name for name in (*declared.reads, *declared.optional) if name in batch)
        )
        self.log.append(Seen(f"{self.role}.{method}", seen))
        return seen

    def answers(self, name: str, rows: Sequence[Any], number: int) -> list[Any]:
        first = self.answered.get(name, 0)
        self.answered[name] = first + number
        return [rows[(first + row) % len(rows)] for row in range(number)]

    def per_token(self, name: str, rows: list[list[float]], batch: Batch) -> Ragged:
        lengths = batch.ragged("response_ids").lengths.tolist()
        if "loss_mask" in batch:
            lengths = [int(row.sum()) for row in batch.ragged("loss_mask").unbind()]
        answer = (
            self.answers(name, rows, len(batch)) if rows else [[0.0] * length for length in lengths]
        )
        assert [len(row) for row in answer] == lengths, "the script does not fit itself"
        return Ragged.of(answer, torch.float32)


class FakeActor(Fake):
    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        seen = self.note(Actor, "generate_sequences", prompts)
        self.log[-1].do_sample = do_sample
        responses = Batch.of(
            response_ids=Ragged.of(self.answers("responses", self.script.responses, len(seen)))
        )
        return responses | Batch.of(
            rollout_log_probs=self.per_token("rollout_log_probs", self.script.log_probs, responses),
            finish_reason=["stop"] * len(seen),
            num_tokens=seen.ragged("prompt_ids").lengths + responses.ragged("response_ids").lengths,
            weight_version=torch.zeros(len(seen), dtype=torch.int64),
        )

    def compute_log_prob(self, batch: Batch) -> Batch:
        return Batch.of(
            log_probs=self.per_token(
                "log_probs", self.script.log_probs, self.note(Actor, "compute_log_prob", batch)
            )
        )

    def update_actor(self, batch: Batch) -> Metrics:
        self.note(Actor, "update_actor", batch)
        return Metrics({"actor/loss": 1.0})

    def update_supervised(self, batch: Batch) -> Metrics:
        self.note(Actor, "update_supervised", batch)
        return Metrics({"actor/loss": 1.0})

    def update_dpo(self, batch: Batch, loss: DPOLossConfig) -> Metrics:
        self.note(Actor, "update_dpo", batch)
        return Metrics({"actor/loss": 1.0})

    def update_distilled(self, batch: Batch) -> Metrics:
        self.note(Actor, "update_distilled", batch)
        return Metrics({"actor/loss": 1.0})


class FakeCritic(Fake):
    def compute_values(self, batch: Batch) -> Batch:
        return Batch.of(
            values=self.per_token(
                "values", self.script.values, self.note(Critic, "compute_values", batch)
            )
        )

    def update_critic(self, batch: Batch) -> Metrics:
        self.note(Critic, "update_critic", batch)
        return Metrics({"critic/loss": 2.0})


class FakeReference(Fake):
    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        seen = self.note(Reference, "compute_ref_log_prob", batch)
        return Batch.of(
            ref_log_probs=self.per_token("ref_log_probs", self.script.ref_log_probs, seen)
        )


class FakeReward(Fake):
    def compute_reward(self, batch: Batch) -> Batch:
        number = len(self.note(Reward, "compute_reward", batch))
        rewards = torch.tensor(self.answers("rewards", self.script.rewards, number))
        return Batch.of(
            rewards=rewards, reward_metrics=[{"right": float(i == 0)} for i in range(number)]
        )


class FakeCost(Fake):
    def compute_cost(self, batch: Batch) -> Batch:
        number = len(self.note(Cost, "compute_cost", batch))
        return Batch.of(
            costs=torch.tensor(self.answers("costs", self.script.costs, number)),
            cost_metrics=[{}] * number,
        )


class FakePrompts:
    """Further prompts, numbered from 100 on."""

    def __init__(self, samples_per_prompt: int) -> None:
        self.samples_per_prompt = samples_per_prompt
        self.taken = 0

    def take(self, num_rows: int = 0) -> Batch:
        assert num_rows > 0
        uid = [
            100 + self.taken + row
            for row in range(num_rows)
            for _ in range(self.samples_per_prompt)
        ]
        self.taken += num_rows
        return prompts(uid)


FAKES: dict[str, Callable[[str, Log, Script], Any]] = {
    "actor": FakeActor,
    "critic": FakeCritic,
    "cost_critic": FakeCritic,
    "reference": FakeReference,
    "reward": FakeReward,
    "cost": FakeCost,
    "judge": FakeReward,
    "teacher": FakeReference,
}
CLASSES: dict[str, type[Worker]] = {
    "actor": Actor,
    "critic": Critic,
    "cost_critic": Critic,
    "reference": Reference,
    "reward": Reward,
    "cost": Cost,
    "judge": Reward,
    "teacher": Reference,
}


def fakes(script: Script) -> tuple[dict[str, Any], Log]:
    log = Log()
    return {role: fake(role, log, script) for role, fake in FAKES.items()}, log


def streams(samples_per_prompt: int = 2) -> dict[str, Stream]:
    return {"prompts": FakePrompts(samples_per_prompt), "pretraining": EmptyStream()}


def prompts(uid: list[int]) -> Batch:
    """One row a sample, of prompts of 1, 2, 3, ... tokens."""
    return Batch.of(
        prompt_ids=Ragged.of([[5] * (row + 1) for row in range(len(uid))]),
        uid=torch.tensor(uid),
        extras=[{} for _ in uid],
        sample=torch.tensor([uid[:row].count(number) for row, number in enumerate(uid)]),
    )
