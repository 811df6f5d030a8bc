"""REINFORCE++ with baseline (Hu et al. 2025): rewards minus the mean of the group, then whitened
over the whole batch, not the group.

Its KL stands in the loss (actor.loss.kl_estimator=k2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from controllers.advantages import reinforce_plus_plus_baseline
from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    batch_metrics,
    mini_batch_column,
    response_lengths,
)
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class ReinforcePlusPlusBaselineConfig(AlgorithmConfig):
    name: str = "reinforce_plus_plus_baseline"
    samples_per_prompt: int = 8
    fewest_samples: ClassVar[int] = 2


class ReinforcePlusPlusBaseline(Stateless):
    def __init__(
        self,
        *,
        actor: Actor,
        reference: Reference,
        reward: Reward,
        config: ReinforcePlusPlusBaselineConfig,
    ) -> None:
        self.actor, self.reference, self.reward, self.config = actor, reference, reward, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= compute_advantages(batch, self.config)
        return batch_metrics(batch) | self.actor.update_actor(batch)


@on_controller(
    reads=("uid", "rewards", "num_tokens", "prompt_ids"),
    optional=("num_sampled",),
    writes=("advantages", "mini_batch"),
)
def compute_advantages(batch: Batch, config: ReinforcePlusPlusBaselineConfig) -> Batch:
    """Reward minus the mean of the group on every token, whitened over all tokens of the batch."""
    lengths = response_lengths(batch)
    advantages = reinforce_plus_plus_baseline(batch.tensor("rewards"), batch.tensor("uid"), lengths)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
