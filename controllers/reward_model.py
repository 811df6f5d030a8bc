"""Reward model: Bradley-Terry on preference pairs (Ouyang et al. 2022, InstructGPT, eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    assign_pair_mini_batches,
    count_tokens,
    pair_accuracy,
)
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.roles import PreferenceModel


@dataclass(kw_only=True)
class RewardModelConfig(AlgorithmConfig):
    name: str = "reward_model"


class RewardModel(Stateless):
    """Saves a sequence-classification directory that reward.model.path takes."""

    def __init__(self, *, reward_model: PreferenceModel, config: RewardModelConfig) -> None:
        self.reward_model, self.config = reward_model, config

    def step(self, pairs: Batch) -> Metrics:
        pairs |= assign_pair_mini_batches(pairs, self.config)
        return count_tokens(pairs) | self.reward_model.update_preferences(pairs)

    def evaluate(self, pairs: Batch) -> Mapping[str, float]:
        return pair_accuracy(pairs, self.reward_model.compute_scores(pairs).tensor("scores"))
