"""Pass@k training (Chen et al. 2025): the policy is rewarded if one of k samples is right, so
that it keeps trying different ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from controllers.advantages import pass_at_k
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
class PassAtKConfig(AlgorithmConfig):
    name: str = "pass_at_k"
    samples_per_prompt: int = 8
    k: int = 4
    """Size of the sets of samples in which a single right sample suffices."""
    right_from: float = 0.5
    """Smallest reward that counts as right."""
    fewest_samples: ClassVar[int] = 2

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        if not 1 <= self.k <= self.samples_per_prompt:
            raise ValueError(
                f"algorithm.k is {self.k}; choose 1 to algorithm.samples_per_prompt "
                f"({self.samples_per_prompt})"
            )


class PassAtK(Stateless):
    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: PassAtKConfig
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
def compute_advantages(batch: Batch, config: PassAtKConfig) -> Batch:
    """The mean advantage of a sample over all sets of k samples that it is in, on every token."""
    lengths = response_lengths(batch)
    right = batch.tensor("rewards") >= config.right_from
    advantages = pass_at_k(right, batch.tensor("uid"), lengths, config.k)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
