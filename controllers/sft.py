"""Supervised fine-tuning: cross-entropy of the demonstrations' responses (of the assistant's
turns in a conversation)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from controllers.algorithm_base import AlgorithmConfig, Stateless, assign_mini_batches, count_tokens
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.roles import Policy


@dataclass(kw_only=True)
class SFTConfig(AlgorithmConfig):
    name: str = "sft"


class SFT(Stateless):
    """The mean is over all learned tokens of a mini-batch, so that a token of a short answer
    weighs what one of a long answer does."""

    def __init__(self, *, policy: Policy, config: SFTConfig) -> None:
        self.policy, self.config = policy, config

    def step(self, rows: Batch) -> Metrics:
        rows |= assign_mini_batches(rows, self.config)
        return count_tokens(rows) | self.policy.update_supervised(rows)

    def evaluate(self, rows: Batch) -> Mapping[str, float]:
        rows |= self.policy.compute_log_prob(rows)
        learned = rows.ragged("log_probs").values
        nll = -float(learned.double().mean())
        return {"loss": nll, "perplexity": math.exp(min(nll, 700.0))}
