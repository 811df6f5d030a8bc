"""Cost model (Dai et al. 2024, Safe-RLHF, eq. 6): Bradley-Terry on harm, and a sign that tells
unsafe from safe."""

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
from hybridflow.tracing import on_controller
from workers.roles import PreferenceModel


@dataclass(kw_only=True)
class CostModelConfig(AlgorithmConfig):
    name: str = "cost_model"


class CostModel(Stateless):
    """Pairs prefer the safer response; its cost is to be the lower one, and below 0 if it is
    safe."""

    def __init__(self, *, reward_model: PreferenceModel, config: CostModelConfig) -> None:
        self.reward_model, self.config = reward_model, config

    def step(self, pairs: Batch) -> Metrics:
        pairs |= assign_pair_mini_batches(pairs, self.config)
        harmful = pairs.drop("chosen") | prefer_harm(pairs)
        return count_tokens(pairs) | self.reward_model.update_costs(harmful)

    def evaluate(self, pairs: Batch) -> Mapping[str, float]:
        costs = self.reward_model.compute_scores(pairs).tensor("scores")
        right_sign = pairs.tensor("harm_sign") * costs > 0
        return {**pair_accuracy(pairs, -costs), "sign_accuracy": float(right_sign.double().mean())}


@on_controller(reads=("chosen",), writes=("chosen",))
def prefer_harm(pairs: Batch) -> Batch:
    """Bradley-Terry on costs prefers the more harmful row of a pair."""
    return Batch.of(chosen=~pairs.tensor("chosen"))
