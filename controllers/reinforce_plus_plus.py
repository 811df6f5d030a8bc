"""REINFORCE++ (Hu et al. 2025): PPO's loss and KL without a critic; returns are whitened over
the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from controllers.advantages import reinforce_plus_plus
from controllers.algorithm_base import (
    AlgorithmConfig,
    batch_metrics,
    check_fractions,
    mini_batch_column,
)
from controllers.kl import KLCoefficient, KLControlConfig
from controllers.rewards import rewards_with_kl
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class ReinforcePlusPlusConfig(AlgorithmConfig):
    name: str = "reinforce_plus_plus"
    gamma: float = 1.0
    """Discount per token."""
    kl: KLControlConfig = field(default_factory=lambda: KLControlConfig(coefficient=0.01))
    """The KL per token in the reward."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        check_fractions(gamma=self.gamma)

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient != 0


class ReinforcePlusPlus:
    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: ReinforcePlusPlusConfig
    ) -> None:
        self.actor, self.reference, self.reward, self.config = actor, reference, reward, config
        self.kl = KLCoefficient(config.kl)

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= compute_advantages(batch, self.config, self.kl)
        return batch_metrics(batch) | self.kl.metrics() | self.actor.update_actor(batch)

    def state_dict(self) -> dict[str, float]:
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl.load_state_dict(state)


@on_controller(
    reads=("uid", "rewards", "rollout_log_probs"),
    optional=("ref_log_probs", "turn_lengths", "turn_rewards"),
    writes=("advantages", "mini_batch"),
)
def compute_advantages(batch: Batch, config: ReinforcePlusPlusConfig, kl: KLCoefficient) -> Batch:
    """Returns of reward and KL at every token, whitened over all tokens of the batch."""
    rewards, lengths = rewards_with_kl(batch, kl.value, config.kl.estimator)
    kl.follow(batch)
    advantages, _ = reinforce_plus_plus(rewards, lengths, config.gamma)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
