"""DAPO (Yu et al. 2025): GRPO with dynamic sampling, overlong reward shaping, clip-higher and a
loss of tokens; no KL.

Clip-higher and the token-level loss are the loss's (actor.loss.clip_high=0.28,
actor.loss.aggregation=token_mean).
"""

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
from controllers.rewards import groups_with_signal, overlong_penalty
from controllers.streams import Stream
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.results import Metrics
from hybridflow.tracing import on_controller
from workers.roles import Actor, Reward


@dataclass(kw_only=True)
class DAPOConfig(AlgorithmConfig):
    name: str = "dapo"
    samples_per_prompt: int = 8
    max_rounds: int = 10
    """Generations of a step at most, each for the prompts that are still missing; 1 turns
    dynamic sampling's refill off. A step that is short of prompts after that trains on those it
    has, and says so."""
    overlong_buffer_tokens: int = 0
    """Tokens before the length limit over which the penalty grows from 0 to overlong_penalty; 0
    turns it off."""
    overlong_penalty: float = 1.0
    """A response of max_response_tokens loses this much of its reward."""
    max_response_tokens: int = 0
    """The length limit that the penalty refers to:
    actor.generation.sampling.max_response_tokens."""
    fewest_samples: ClassVar[int] = 2

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        if self.max_rounds < 1:
            raise ValueError(f"algorithm.max_rounds is {self.max_rounds}; use at least 1")
        if (
            self.overlong_buffer_tokens
            and not 0 < self.overlong_buffer_tokens <= self.max_response_tokens
        ):
            raise ValueError(
                f"algorithm.overlong_buffer_tokens is {self.overlong_buffer_tokens}; choose 1 to "
                f"algorithm.max_response_tokens ({self.max_response_tokens}), or 0 for no penalty"
            )


class DAPO(Stateless):
    """No response that can teach something is thrown away: each round asks for exactly as many
    prompts as are missing."""

    def __init__(
        self, *, actor: Actor, reward: Reward, prompts: Stream, config: DAPOConfig
    ) -> None:
        self.actor, self.reward, self.prompts, self.config = actor, reward, prompts, config

    def step(self, prompts: Batch) -> Metrics:
        first = self.rollout(prompts)
        batch, num_sampled, num_rounds = with_signal(first), len(first), 1
        while len(batch) < len(prompts) and num_rounds < self.config.max_rounds:
            num_missing = (len(prompts) - len(batch)) // self.config.samples_per_prompt
            further = self.rollout(self.prompts.take(num_missing))
            batch = Batch.concat([batch, with_signal(further)])
            num_sampled += len(further)
            num_rounds += 1
        metrics = self.sampling_metrics(len(batch), num_sampled, num_rounds)
        batch = batch or first  # No round has anything to learn from: all advantages are 0.
        batch |= compute_advantages(batch, self.config)
        return batch_metrics(batch) | metrics | self.actor.update_actor(batch)

    def rollout(self, prompts: Batch) -> Batch:
        batch = prompts | self.actor.generate_sequences(prompts)
        return batch | self.reward.compute_reward(batch)

    def sampling_metrics(self, num_with_signal: int, num_sampled: int, num_rounds: int) -> Metrics:
        samples = self.config.samples_per_prompt
        return Metrics(
            {
                "dynamic_sampling/rounds": num_rounds,
                "dynamic_sampling/prompts_kept": num_with_signal // samples,
                "dynamic_sampling/prompts_filtered": (num_sampled - num_with_signal) // samples,
            }
        )


@on_controller(reads=("uid", "rewards"), chooses_rows=True)
def with_signal(batch: Batch) -> Batch:
    """The samples of prompts whose rewards differ; if all are right or all are wrong, every
    advantage is 0 (DAPO, eq. 11)."""
    return batch.rows(groups_with_signal(batch.tensor("rewards"), batch.tensor("uid")).numpy())


@on_controller(
    reads=("uid", "rewards", "num_tokens", "prompt_ids"),
    optional=("num_sampled",),
    writes=("advantages", "mini_batch"),
)
def compute_advantages(batch: Batch, config: DAPOConfig) -> Batch:
    """GRPO's advantage of the reward minus the penalty of overlong responses."""
    lengths, scores = response_lengths(batch), batch.tensor("rewards")
    if config.overlong_buffer_tokens:
        penalty = overlong_penalty(
            lengths, config.max_response_tokens, config.overlong_buffer_tokens
        )
        scores = scores + config.overlong_penalty * penalty
    advantages = grpo(scores, batch.tensor("uid"), lengths)
    return Batch.of(
        advantages=Ragged(advantages, lengths),
        mini_batch=mini_batch_column(batch.tensor("uid"), config),
    )
