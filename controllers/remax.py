"""ReMax (Li et al. 2024): REINFORCE whose baseline is the reward of the prompt's greedy
response."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from controllers.advantages import remax
from controllers.algorithm_base import AlgorithmConfig, batch_metrics, mini_batch_column
from controllers.kl import KLCoefficient, KLControlConfig
from controllers.rewards import rewards_with_kl
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class ReMaxConfig(AlgorithmConfig):
    name: str = "remax"
    kl: KLControlConfig = field(default_factory=lambda: KLControlConfig(coefficient=0.05))
    """The KL per token in the reward."""

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient != 0


class ReMax:
    """PPO's step without a critic, with a second, greedy generation and its reward."""

    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: ReMaxConfig
    ) -> None:
        self.actor, self.reference, self.reward, self.config = actor, reference, reward, config
        self.kl = KLCoefficient(config.kl)

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        greedy = prompts | self.actor.generate_sequences(prompts, do_sample=False)
        batch, greedy = answered_in_both(batch, greedy, prompts)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.reward.compute_reward(batch)
        batch |= (
            self.reward.compute_reward(greedy).select("rewards").rename(rewards="baseline_rewards")
        )
        batch |= compute_advantages(batch, self.config, self.kl)
        return batch_metrics(batch) | self.kl.metrics() | self.actor.update_actor(batch)

    def state_dict(self) -> dict[str, float]:
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl.load_state_dict(state)


def answered_in_both(batch: Batch, greedy: Batch, prompts: Batch) -> tuple[Batch, Batch]:
    """The rows of prompts that have both responses; all but of episodes that were given up."""
    if len(batch) == len(greedy) == len(prompts):
        return batch, greedy
    here, there = batch.tensor("uid"), greedy.tensor("uid")
    return (
        batch.rows(torch.isin(here, there).numpy()),
        greedy.rows(torch.isin(there, here).numpy()),
    )


@on_controller(
    reads=("uid", "rewards", "baseline_rewards", "rollout_log_probs"),
    optional=("ref_log_probs", "turn_lengths", "turn_rewards"),
    writes=("advantages", "mini_batch"),
)
def compute_advantages(batch: Batch, config: ReMaxConfig, kl: KLCoefficient) -> Batch:
    """Returns of reward and KL at every token, minus the greedy response's reward."""
    rewards, lengths = rewards_with_kl(batch, kl.value, config.kl.estimator)
    kl.follow(batch)
    advantages, _ = remax(rewards, batch.tensor("baseline_rewards"), lengths)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
