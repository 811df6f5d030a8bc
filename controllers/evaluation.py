"""Evaluates a model without training it: responses to a data set's prompts, scored or not, and
pass@k of several responses to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from controllers.algorithm_base import AlgorithmConfig, Stateless, batch_metrics
from controllers.episodes import episode_metrics, whole_rows
from hybridflow.batch import Batch
from hybridflow.errors import UserCodeError
from hybridflow.results import Metrics
from workers.roles import Generator, Reward


@dataclass(kw_only=True)
class GenerateConfig(AlgorithmConfig):
    """Writes a model's responses to a data set's prompts, without scoring them or training it."""

    name: str = "generate"
    log_probs: bool = False
    """Also store the log-probs of the response's tokens."""


@dataclass(kw_only=True)
class EvaluateConfig(AlgorithmConfig):
    """Evaluates a model without training it: responses to a data set's prompts, scored, and pass@k
    of several responses to each."""

    name: str = "evaluate"
    success_reward: float = 1.0
    """An answer with at least this reward has passed."""
    pass_at: list[int] = field(default_factory=list)
    """k of pass@k, each at most samples_per_prompt; empty: 1, 2, 4, ... up to it."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        wrong = [k for k in self.pass_at if not 1 <= k <= self.samples_per_prompt]
        if wrong:
            raise ValueError(
                f"algorithm.pass_at has {wrong[0]}, and algorithm.samples_per_prompt is "
                f"{self.samples_per_prompt}; k must be at least 1 and at most that"
            )

    @property
    def ks(self) -> list[int]:
        return self.pass_at or [2**n for n in range(self.samples_per_prompt.bit_length())]


class Generate(Stateless):
    def __init__(self, *, generator: Generator, config: GenerateConfig) -> None:
        self.generator, self.config = generator, config

    def answer(self, prompts: Batch) -> Batch:
        """The prompts with their responses."""
        return prompts | self.generator.generate_sequences(prompts)

    def step(self, prompts: Batch) -> Metrics:
        return batch_metrics(self.answer(prompts))


class Evaluate(Generate):
    def __init__(self, *, generator: Generator, reward: Reward, config: EvaluateConfig) -> None:
        self.generator, self.reward, self.config = generator, reward, config  # type: ignore[assignment]

    def answer(self, prompts: Batch) -> Batch:
        batch = prompts | self.generator.generate_sequences(prompts)
        return batch | self.reward.compute_reward(batch)


def pass_at_k(passed: Sequence[int], num_samples: int, k: int) -> float:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k): the chance that k of n answers, drawn
    without replacement, contain one that passed (Chen et al. 2021, Codex, eq. 1), without bias.
    passed: c of each prompt."""
    missed = 0.0
    for c in passed:
        if num_samples - c >= k:
            missed += float(np.prod(1 - k / np.arange(num_samples - c + 1, num_samples + 1)))
    return 1 - missed / len(passed)


def measure(answers: Sequence[Batch], config: EvaluateConfig) -> Mapping[str, float]:
    """The metrics of all answers together: mean reward, pass@k, lengths, and the reward's
    further numbers; groups of episodes that were given up are counted and left out."""
    drawn = Batch.concat(list(answers))
    batch = drawn.rows(whole_rows(drawn).numpy())
    if not batch:
        raise UserCodeError("every group of episodes was given up; the log says why")
    passed: dict[int, int] = {}
    # Compared as float32, which rewards are: 0.9 is less than itself otherwise.
    successes = batch.tensor("rewards") >= config.success_reward
    for uid, success in zip(batch.tensor("uid").tolist(), successes.tolist(), strict=True):
        passed[uid] = passed.get(uid, 0) + success
    counts = list(passed.values())
    rates = {f"pass@{k}": pass_at_k(counts, config.samples_per_prompt, k) for k in config.ks}
    numbers = {"prompts": float(len(counts)), **rates, **batch_metrics(batch)}
    return numbers | episode_metrics(drawn)
