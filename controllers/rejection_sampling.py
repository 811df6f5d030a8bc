"""Rejection sampling (Touvron et al. 2023, Llama 2, section 3.2.3; RAFT, Dong et al. 2023): the
best of n answers is imitated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    assign_mini_batches,
    batch_metrics,
)
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reward


@dataclass(kw_only=True)
class RejectionSamplingConfig(AlgorithmConfig):
    name: str = "rejection_sampling"
    samples_per_prompt: int = 8
    min_reward: float | None = None
    """Smallest reward of a prompt's best answer: prompts below it are left out of the step (a
    metric counts those that stay); null keeps all."""


class RejectionSampling(Stateless):
    """Llama 2 samples answers to all prompts first and fine-tunes then; here each step samples
    from the current policy."""

    def __init__(self, *, actor: Actor, reward: Reward, config: RejectionSamplingConfig) -> None:
        self.actor, self.reward, self.config = actor, reward, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reward.compute_reward(batch)
        best = best_of_each_prompt(batch, self.config)
        best |= assign_mini_batches(best, self.config)
        return batch_metrics(batch) | best_metrics(best) | self.actor.update_supervised(best)


@on_controller(reads=("uid", "rewards"), chooses_rows=True)
def best_of_each_prompt(batch: Batch, config: RejectionSamplingConfig) -> Batch:
    """The row with the highest reward of every prompt, the first of equals."""
    uid, rewards = batch.tensor("uid").numpy(), batch.tensor("rewards").numpy()
    order = np.lexsort((np.arange(len(uid)), -rewards, uid))
    best = order[np.unique(uid[order], return_index=True)[1]]
    if config.min_reward is not None:
        best = best[rewards[best] >= config.min_reward]
    return batch.rows(best)


def best_metrics(best: Batch) -> Metrics:
    """Number and mean reward of the answers that are imitated; 0 if there are none."""

    def measure() -> dict[str, float]:
        reward = 0.0
        if best:
            reward = float(best.tensor("rewards").mean())
        return {"best/rows": float(len(best)), "best/reward": reward}

    return Metrics(sources=[measure])
