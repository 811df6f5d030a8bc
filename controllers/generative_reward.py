"""GRPO with a generative reward model (Zhang et al. 2024, "Generative verifiers"): a language
model reads each answer and its verdict is the reward: the probability that it says yes, or what
it writes after thinking (judge.verdict)."""

from __future__ import annotations

from dataclasses import dataclass

from controllers.algorithm_base import Stateless, batch_metrics
from controllers.grpo import GRPOConfig, compute_advantages
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.roles import Actor, Reference, Reward


@dataclass(kw_only=True)
class GenerativeRewardConfig(GRPOConfig):
    name: str = "generative_reward"


class GenerativeReward(Stateless):
    """The judge is a role of its own, so that validation can ask a true reward beside it and
    over-optimisation shows."""

    def __init__(
        self, *, actor: Actor, reference: Reference, judge: Reward, config: GenerativeRewardConfig
    ) -> None:
        self.actor, self.reference, self.judge, self.config = actor, reference, judge, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reference.compute_ref_log_prob(batch)
        batch |= self.judge.compute_reward(batch)
        batch |= compute_advantages(batch, self.config)
        return batch_metrics(batch) | self.actor.update_actor(batch)
