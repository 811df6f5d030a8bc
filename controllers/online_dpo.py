"""Online DPO (Guo et al. 2024, "Direct language model alignment from online AI feedback"): the
policy answers a prompt several times, a judge says which answer is best and which is worst, and
the pair trains the policy at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    assign_pair_mini_batches,
    batch_metrics,
)
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.losses.config import DPOLossConfig
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class OnlineDPOConfig(AlgorithmConfig):
    name: str = "online_dpo"
    samples_per_prompt: int = 4
    """At least 2; the best and the worst of them are the pair."""
    loss: DPOLossConfig = field(default_factory=DPOLossConfig)

    fewest_samples: ClassVar[int] = 2

    @property
    def needs_reference(self) -> bool:
        return True


class OnlineDPO(Stateless):
    """The judge scores answers one by one (Guo et al. show it two at once), so that n answers
    cost n judgements."""

    def __init__(
        self, *, actor: Actor, reference: Reference, judge: Reward, config: OnlineDPOConfig
    ) -> None:
        self.actor, self.reference, self.judge, self.config = actor, reference, judge, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.judge.compute_reward(batch)
        pairs = best_and_worst(batch)
        pairs |= self.reference.compute_ref_log_prob(pairs)
        pairs |= assign_pair_mini_batches(pairs, self.config)
        return (
            batch_metrics(batch)
            | count_pairs(pairs)
            | self.actor.update_dpo(pairs, self.config.loss)
        )


@on_controller(reads=("uid", "rewards"), writes=("pair", "chosen"), chooses_rows=True)
def best_and_worst(batch: Batch) -> Batch:
    """The rows with the highest and the lowest reward of every prompt; prompts whose answers
    all have the same reward have no pair."""
    uid, rewards = batch.tensor("uid").numpy(), batch.tensor("rewards").numpy()
    order = np.lexsort((np.arange(len(uid)), rewards, uid))
    _, first, count = np.unique(uid[order], return_index=True, return_counts=True)
    worst, best = order[first], order[first + count - 1]
    differ = rewards[best] > rewards[worst]
    rows = np.stack([best[differ], worst[differ]], axis=1).reshape(-1)
    chosen = torch.tensor([True, False]).repeat(len(rows) // 2)
    return batch.rows(rows) | Batch.of(pair=uid[rows], chosen=chosen)


def count_pairs(pairs: Batch) -> Metrics:
    return Metrics(sources=[lambda: {"pairs": len(pairs) / 2}])
