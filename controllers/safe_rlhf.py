"""Safe-RLHF (Dai et al. 2024): as much reward as possible while the mean cost stays under a
threshold.

PPO with a cost model beside the reward, a critic for each, and a Lagrange multiplier between them;
and PPO-ptx (Ouyang et al. 2022): text of the pretraining distribution in every update, so that the
policy does not forget it (data.pretraining, actor.loss.pretraining_coefficient).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from controllers.advantages import gae, safe_rlhf, whiten
from controllers.algorithm_base import (
    AlgorithmConfig,
    batch_metrics,
    check_fractions,
    mini_batch_column,
)
from controllers.kl import KLCoefficient, KLControlConfig
from controllers.lagrange import LagrangeConfig, LagrangeMultiplier
from controllers.pretraining import with_pretraining
from controllers.rewards import rewards_with_kl
from controllers.streams import Stream
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Cost, Critic, Reference, Reward


@dataclass(kw_only=True)
class SafeRLHFConfig(AlgorithmConfig):
    name: str = "safe_rlhf"
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """lambda of GAE: 1 is low bias, smaller values trade it for less variance."""
    kl: KLControlConfig = field(default_factory=lambda: KLControlConfig(coefficient=0.02))
    """The KL per token: one half lowers the rewards, the other raises the costs."""
    lagrange: LagrangeConfig = field(default_factory=LagrangeConfig)
    whiten_advantages: bool = True
    """Whiten the combined advantage of reward and cost."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        check_fractions(gamma=self.gamma, lam=self.lam)

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient != 0


class SafeRLHF:
    """PPO's calls, the cost's, and the pretraining rows."""

    def __init__(
        self,
        *,
        actor: Actor,
        critic: Critic,
        cost_critic: Critic,
        reference: Reference,
        reward: Reward,
        cost: Cost,
        pretraining: Stream,
        config: SafeRLHFConfig,
    ) -> None:
        self.actor = actor
        self.critic = critic
        self.cost_critic = cost_critic
        self.reference = reference
        self.reward, self.cost, self.pretraining, self.config = reward, cost, pretraining, config
        self.kl = KLCoefficient(config.kl)
        self.multiplier = LagrangeMultiplier(config.lagrange)

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.critic.compute_values(batch)
        batch |= self.cost_critic.compute_values(batch).rename(values="cost_values")
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= self.cost.compute_cost(batch)
        batch |= compute_advantages(batch, self.config, self.kl, self.multiplier)
        critic_metrics = self.critic.update_critic(batch)
        cost_batch = batch.drop("values", "returns").rename(
            cost_values="values", cost_returns="returns"
        )
        critic_metrics |= self.cost_critic.update_critic(cost_batch).renamed(
            "critic/", "cost_critic/"
        )
        actor_metrics = self.actor.update_actor(with_pretraining(batch, self.pretraining))
        metrics = batch_metrics(batch) | self.kl.metrics() | self.multiplier.metrics()
        return metrics | critic_metrics | actor_metrics

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict(), "multiplier": self.multiplier.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.multiplier.load_state_dict(state["multiplier"])


@on_controller(
    reads=("uid", "rewards", "costs", "values", "cost_values", "rollout_log_probs"),
    optional=("ref_log_probs", "turn_lengths", "turn_rewards"),
    writes=("advantages", "returns", "cost_returns", "mini_batch"),
)
def compute_advantages(
    batch: Batch, config: SafeRLHFConfig, kl: KLCoefficient, multiplier: LagrangeMultiplier
) -> Batch:
    """GAE of rewards and of costs, each with its critic and half of the KL, and lambda between them
    (eq. 10 and 12).

    lambda moves first, by the costs of this batch.
    """
    multiplier.update(batch.tensor("costs").tolist())
    half = kl.value / 2
    rewards, lengths = rewards_with_kl(batch, half, config.kl.estimator)
    costs, _ = rewards_with_kl(batch, -half, config.kl.estimator, scores="costs")
    advantages, returns = gae(
        rewards, batch.ragged("values").values, lengths, config.gamma, config.lam
    )
    cost_advantages, cost_returns = gae(
        costs, batch.ragged("cost_values").values, lengths, config.gamma, config.lam
    )
    advantages = safe_rlhf(advantages, cost_advantages, multiplier.value)
    if config.whiten_advantages:
        advantages = whiten(advantages)
    kl.follow(batch)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        returns=Ragged(returns, lengths),
        cost_returns=Ragged(cost_returns, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
