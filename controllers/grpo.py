"""GRPO (Shao et al. 2024, DeepSeekMath): rewards normalised inside the group of samples of one
prompt stand in for the critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from controllers.advantages import grpo
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
class GRPOConfig(AlgorithmConfig):
    """GRPO (Shao et al. 2024, DeepSeekMath): rewards normalised inside the group of samples of one
    prompt stand in for the critic."""

    name: str = "grpo"
    samples_per_prompt: int = 8
    scale_by_std: bool = True
    """Divide by the group's standard deviation; false is Dr.GRPO's advantage."""
    fewest_samples: ClassVar[int] = 2


@dataclass(kw_only=True)
class DrGRPOConfig(GRPOConfig):
    """Dr.GRPO (Liu et al. 2025, "Understanding R1-Zero-like training"): neither the group's
    deviation nor a response's length divides.

    The second half is the loss's: actor.loss.aggregation=constant.
    """

    name: str = "dr_grpo"
    scale_by_std: bool = False


@dataclass(kw_only=True)
class GSPOConfig(GRPOConfig):
    """GSPO (Zheng et al. 2025): GRPO's step, with a loss that clips the ratio of whole
    responses."""

    name: str = "gspo"
    losses: ClassVar[tuple[str, ...]] = ("gspo",)


@dataclass(kw_only=True)
class CISPOConfig(GRPOConfig):
    """CISPO (MiniMax-M1, 2025): GRPO's step, with a loss that clips the importance weight and
    keeps every token's gradient."""

    name: str = "cispo"
    losses: ClassVar[tuple[str, ...]] = ("cispo",)


class GRPO(Stateless):
    """The KL to the reference stands in the actor's loss (actor.loss.kl_coefficient).

    The paper has one of 0.04 (k3) and takes means over responses of means over tokens
    (actor.loss.aggregation=seq_mean_token_mean); the defaults here are no KL and one mean over all
    tokens, as in most work since.
    """

    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: GRPOConfig
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
def compute_advantages(batch: Batch, config: GRPOConfig) -> Batch:
    """(reward - mean of the group) / standard deviation of the group, on every token of the
    response."""
    lengths = response_lengths(batch)
    advantages = grpo(
        batch.tensor("rewards"), batch.tensor("uid"), lengths, scale_by_std=config.scale_by_std
    )
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
