"""PPO for RLHF (Schulman et al. 2017; Ouyang et al. 2022): actor, critic, reference, reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from controllers.advantages import gae, whiten
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
from workers.roles import Actor, Critic, Reference, Reward


@dataclass(kw_only=True)
class PPOConfig(AlgorithmConfig):
    name: str = "ppo"
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """lambda of GAE: 1 is low bias, smaller values trade it for less variance."""
    whiten_advantages: bool = True
    """Shift and scale the advantages to mean 0 and variance 1 over all tokens of the batch."""
    kl: KLControlConfig = field(default_factory=lambda: KLControlConfig(coefficient=0.05))
    """The KL to the reference in the reward."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        check_fractions(gamma=self.gamma, lam=self.lam)

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient != 0


class PPO:
    """One step is the paper's seven calls."""

    def __init__(
        self,
        *,
        actor: Actor,
        critic: Critic,
        reference: Reference,
        reward: Reward,
        config: PPOConfig,
    ) -> None:
        self.actor, self.critic, self.reference = actor, critic, reference
        self.reward, self.config = reward, config
        self.kl = KLCoefficient(config.kl)

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.critic.compute_values(batch)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= compute_advantages(batch, self.config, self.kl)
        critic_metrics = self.critic.update_critic(batch)
        actor_metrics = self.actor.update_actor(batch)
        return batch_metrics(batch) | self.kl.metrics() | critic_metrics | actor_metrics

    def state_dict(self) -> dict[str, float]:
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl.load_state_dict(state)


@on_controller(
    reads=("uid", "rewards", "values", "rollout_log_probs"),
    optional=("ref_log_probs", "turn_lengths", "turn_rewards"),
    writes=("advantages", "returns", "mini_batch"),
)
def compute_advantages(batch: Batch, config: PPOConfig, kl: KLCoefficient) -> Batch:
    """GAE over the reward at the last token minus the KL at every token."""
    rewards, lengths = rewards_with_kl(batch, kl.value, config.kl.estimator)
    advantages, returns = gae(
        rewards, batch.ragged("values").values, lengths, config.gamma, config.lam
    )
    if config.whiten_advantages:
        advantages = whiten(advantages)
    kl.follow(batch)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        returns=Ragged(returns, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
