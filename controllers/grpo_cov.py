"""Clip-Cov and KL-Cov (Cui et al. 2025, "The entropy mechanism of reinforcement learning"): GRPO
that spares the policy's entropy.

Few tokens, those whose log-prob and advantage go together most, lower the entropy most. Which ones
they are is decided here, over the whole batch; the losses clip_cov and kl_cov take their gradient
away or hold them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from controllers.algorithm_base import Stateless, batch_metrics
from controllers.covariance import select_for_clip_cov, select_for_kl_cov
from controllers.grpo import GRPOConfig, compute_advantages
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.seeds import combine_seed
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class CovConfig(GRPOConfig, ABC):
    """Settings of both variants; each selects tokens in its own way."""

    fraction: float = 2e-4
    """Share of all tokens that is selected; at least one token is."""

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"algorithm.fraction is {self.fraction}; choose 0 < fraction <= 1 (2e-4 in the "
                "paper's code)"
            )

    @abstractmethod
    def select(self, advantages: Tensor, log_probs: Tensor, seed: int) -> Tensor:
        """bool [scored_tokens]: True for the tokens that the loss treats specially."""


@dataclass(kw_only=True)
class ClipCovConfig(CovConfig):
    """Clip-Cov (Cui et al. 2025, "The entropy mechanism of reinforcement learning"): GRPO in which
    some tokens whose log-prob and advantage go together, drawn at random, get no gradient.

    They are drawn from those with a covariance between low and high.
    """

    name: str = "clip_cov"
    low: float = 1.0
    """Least covariance of a token that may be clipped."""
    high: float = 5.0
    """Largest covariance of a token that may be clipped."""
    losses: ClassVar[tuple[str, ...]] = ("clip_cov",)

    def __post_init__(self) -> None:
        CovConfig.__post_init__(self)
        if not self.low < self.high:
            raise ValueError(
                f"algorithm.low is {self.low} and algorithm.high {self.high}; choose low < high"
            )

    def select(self, advantages: Tensor, log_probs: Tensor, seed: int) -> Tensor:
        return select_for_clip_cov(
            advantages, log_probs, fraction=self.fraction, low=self.low, high=self.high, seed=seed
        )


@dataclass(kw_only=True)
class KLCovConfig(CovConfig):
    """KL-Cov (Cui et al. 2025, "The entropy mechanism of reinforcement learning"): GRPO in which a
    KL holds back the tokens whose log-prob and advantage go together most.

    Its strength is actor.loss.kl_cov_coefficient.
    """

    name: str = "kl_cov"
    losses: ClassVar[tuple[str, ...]] = ("kl_cov",)

    def select(self, advantages: Tensor, log_probs: Tensor, seed: int) -> Tensor:
        return select_for_kl_cov(advantages, log_probs, fraction=self.fraction)


class CovarianceGRPO(Stateless):
    """GRPO's step and one selection."""

    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: CovConfig
    ) -> None:
        self.actor, self.reference, self.reward, self.config = actor, reference, reward, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= compute_advantages(batch, self.config)
        batch |= select_tokens(batch, self.config)
        return batch_metrics(batch) | self.actor.update_actor(batch)


@on_controller(reads=("uid", "advantages", "rollout_log_probs"), writes=("covariance_selected",))
def select_tokens(batch: Batch, config: CovConfig) -> Batch:
    """Marks tokens by their covariance under the policy that generated them."""
    advantages, log_probs = batch.ragged("advantages"), batch.ragged("rollout_log_probs")
    first_uid = int(batch.tensor("uid").min()) if len(batch) else 0
    seed = combine_seed(config.seed, first_uid) % 2**63
    selected = config.select(advantages.values, log_probs.values, seed)
    assert selected.dtype is torch.bool
    return Batch.of(covariance_selected=Ragged(selected, advantages.lengths))
