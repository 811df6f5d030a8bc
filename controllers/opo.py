"""OPO (Hao et al. 2025, "On-policy RL with optimal reward baseline"): the baseline of a prompt
weighs its samples by their lengths.

The paper trains strictly on policy: one mini-batch, no clip that acts, no KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from controllers.advantages import opo
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
class OPOConfig(AlgorithmConfig):
    name: str = "opo"
    samples_per_prompt: int = 8
    fewest_samples: ClassVar[int] = 2


class OPO(Stateless):
    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: OPOConfig
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
def compute_advantages(batch: Batch, config: OPOConfig) -> Batch:
    """Reward minus the length-weighted mean of the group, on every token."""
    lengths = response_lengths(batch)
    advantages = opo(batch.tensor("rewards"), batch.tensor("uid"), lengths)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
