"""Roles written by hand: they note what each call is given and answer with fixed numbers. No Ray, no model.

A fake sees only the columns that the real method declares, so a page that relies on more fails here as it would in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.worker import Worker, remote_methods
from workers.generation.config import SamplingConfig
from workers.roles import Actor, Critic, Reference, Reward


@dataclass
class Script:
    """What the models answer, row by row."""

    responses: list[list[int]]
    rewards: list[float]
    values: list[list[float]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    ref_log_probs: list[list[float]] = field(default_factory=list)

    def per_token(self, rows: list[list[float]]) -> Ragged:
        rows = rows or [[0.0] * len(response) for response in self.responses]
        assert [len(row) for row in rows] == [len(response) for response in self.responses], "the script does not fit itself"
        return Ragged.of(rows, torch.float32)


@dataclass
class Seen:
    """One call: "actor.update_actor" and the declared columns that it got."""

    name: str
    batch: Batch


class Log(list[Seen]):
    """The calls in order."""

    @property
    def names(self) -> list[str]:
        return [seen.name for seen in self]

    def last(self, name: str) -> Batch:
        return next(seen.batch for seen in reversed(self) if seen.name == name)


class Fake:
    def __init__(self, log: Log, script: Script) -> None:
        self.log, self.script = log, script

    def note(self, role: type[Worker], method: str, batch: Batch) -> Batch:
        declared = remote_methods(role)[method]
        missing = [name for name in declared.reads if name not in batch]
        assert not missing, f"{method} lacks {missing}"
        seen = batch.select(*(name for name in (*declared.reads, *declared.optional) if name in batch))
        self.log.append(Seen(f"{role.__name__.lower()}.{method}", seen))
        return seen


class FakeActor(Fake):
    def generate_sequences(self, prompts: Batch, sampling: SamplingConfig | None = None) -> Batch:
        seen = self.note(Actor, "generate_sequences", prompts)
        responses = Ragged.of(self.script.responses)
        return Batch.of(
            response_ids=responses,
            rollout_log_probs=self.script.per_token(self.script.log_probs),
            finish_reason=["stop"] * len(seen),
            num_tokens=seen.ragged("prompt_ids").lengths + responses.lengths,
            weight_version=torch.zeros(len(seen), dtype=torch.int64),
        )

    def compute_log_prob(self, batch: Batch) -> Batch:
        self.note(Actor, "compute_log_prob", batch)
        return Batch.of(log_probs=self.script.per_token(self.script.log_probs))

    def update_actor(self, batch: Batch) -> Metrics:
        self.note(Actor, "update_actor", batch)
        return Metrics({"actor/loss": 1.0})


class FakeCritic(Fake):
    def compute_values(self, batch: Batch) -> Batch:
        self.note(Critic, "compute_values", batch)
        return Batch.of(values=self.script.per_token(self.script.values))

    def update_critic(self, batch: Batch) -> Metrics:
        self.note(Critic, "update_critic", batch)
        return Metrics({"critic/loss": 2.0})


class FakeReference(Fake):
    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        self.note(Reference, "compute_ref_log_prob", batch)
        return Batch.of(ref_log_probs=self.script.per_token(self.script.ref_log_probs))


class FakeReward(Fake):
    def compute_reward(self, batch: Batch) -> Batch:
        seen = self.note(Reward, "compute_reward", batch)
        return Batch.of(rewards=torch.tensor(self.script.rewards), reward_metrics=[{"right": float(i == 0)} for i in range(len(seen))])


FAKES: dict[str, Callable[[Log, Script], Any]] = {
    "actor": FakeActor,
    "critic": FakeCritic,
    "reference": FakeReference,
    "reward": FakeReward,
}
CLASSES: dict[str, type[Worker]] = {"actor": Actor, "critic": Critic, "reference": Reference, "reward": Reward}


def fakes(script: Script) -> tuple[dict[str, Any], Log]:
    log = Log()
    return {role: fake(log, script) for role, fake in FAKES.items()}, log


def prompts(uid: list[int]) -> Batch:
    """One row a sample, of prompts of 1, 2, 3, ... tokens."""
    return Batch.of(
        prompt_ids=Ragged.of([[5] * (row + 1) for row in range(len(uid))]),
        uid=torch.tensor(uid),
        extras=[{} for _ in uid],
        sample=torch.tensor([uid[:row].count(number) for row, number in enumerate(uid)]),
    )
