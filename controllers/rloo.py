"""RLOO (Ahmadian et al. 2024, "Back to basics"): REINFORCE whose baseline is the mean reward of
the prompt's other samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from controllers.advantages import rloo
from controllers.algorithm_base import AlgorithmConfig, batch_metrics, mini_batch_column
from controllers.kl import KLCoefficient, KLControlConfig
from controllers.rewards import rewards_with_kl
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.losses.segments import row_of_token, segment_sum
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class RLOOConfig(AlgorithmConfig):
    name: str = "rloo"
    samples_per_prompt: int = 4
    kl: KLControlConfig = field(default_factory=lambda: KLControlConfig(coefficient=0.05))
    """The KL of whole responses in the reward."""
    fewest_samples: ClassVar[int] = 2

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient != 0


class RLOO:
    """A whole response is one action (actor.loss.aggregation=seq_mean_token_sum)."""

    def __init__(
        self, *, actor: Actor, reference: Reference, reward: Reward, config: RLOOConfig
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
def compute_advantages(batch: Batch, config: RLOOConfig, kl: KLCoefficient) -> Batch:
    """Reward minus KL of a response, minus the mean of that over the other samples, on every
    token."""
    rewards, lengths = rewards_with_kl(batch, kl.value, config.kl.estimator)
    scores = segment_sum(rewards, row_of_token(lengths), len(batch))
    kl.follow(batch)
    advantages = rloo(scores, batch.tensor("uid"), lengths)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
