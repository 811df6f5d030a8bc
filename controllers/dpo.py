"""DPO (Rafailov et al. 2023): the policy learns from preference pairs directly; its log-ratio
to the reference is the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    assign_pair_mini_batches,
    count_tokens,
    pair_accuracy,
)
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.losses.config import DPOLossConfig
from workers.losses.segments import row_of_token, segment_sum
from workers.roles import Policy, Reference


@dataclass(kw_only=True)
class DPOConfig(AlgorithmConfig):
    name: str = "dpo"
    loss: DPOLossConfig = field(default_factory=DPOLossConfig)

    @property
    def needs_reference(self) -> bool:
        return True


class DPO(Stateless):
    """The reference is the model that the policy starts from, unless reference.model.path says
    otherwise."""

    def __init__(self, *, policy: Policy, reference: Reference, config: DPOConfig) -> None:
        self.policy, self.reference, self.config = policy, reference, config

    def step(self, pairs: Batch) -> Metrics:
        pairs |= self.reference.compute_ref_log_prob(pairs)
        pairs |= assign_pair_mini_batches(pairs, self.config)
        return count_tokens(pairs) | self.policy.update_dpo(pairs, self.config.loss)

    def evaluate(self, pairs: Batch) -> Mapping[str, float]:
        pairs |= self.reference.compute_ref_log_prob(pairs)
        pairs |= self.policy.compute_log_prob(pairs)
        log_probs = pairs.ragged("log_probs")
        ratio = log_probs.values - pairs.ragged("ref_log_probs").values
        rewards = self.config.loss.beta * segment_sum(
            ratio, row_of_token(log_probs.lengths), len(pairs)
        )
        return pair_accuracy(pairs, rewards)
