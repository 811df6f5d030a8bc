"""PolicyWorker: a language model that is trained on given rows: demonstrations, preference pairs, a
teacher's log-probs.

It generates nothing, so it holds no generation engine. ActorTrainingWorker (actor_training.py) adds
the policy-gradient update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.engines.base import Head, LossFn
from workers.losses.aggregation import Aggregation
from workers.losses.config import DPOLossConfig
from workers.losses.language import distillation_loss, language_loss
from workers.losses.preference import dpo_loss
from workers.mini_batches import MiniBatches
from workers.model_worker import pairs_of, sequences_of
from workers.role_config import ActorConfig, PolicyConfig
from workers.roles import Policy
from workers.sequences import Sequences
from workers.trained_worker import TrainedWorker


class PolicyWorker(TrainedWorker, Policy):
    config: PolicyConfig | ActorConfig
    prefix: ClassVar[str] = "policy"

    def __init__(self, config: PolicyConfig | ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(self.config.model, self.config.train, Head.lm, context, seed=config.seed)

    @property
    def weight_version(self) -> int:
        """The version of the weights: the number of updates that made them."""
        return self.num_updates

    @property
    def temperature(self) -> float:
        """Temperature of the log-probs that are compared with another model's: the sampling
        temperature."""
        return 1.0

    def compute_log_prob(self, batch: Batch) -> Batch:
        self.to_training()
        outputs = self.engine.forward(sequences_of(batch), temperature=self.temperature)
        return self.scored(batch, outputs.log_probs if outputs else None, "log_probs")

    def update_supervised(self, batch: Batch) -> Metrics:
        mini_batches = self.mini_batches(batch, sequences_of(batch))
        steps = mini_batches.steps(
            self.config.passes_per_batch, self.update_seed, Aggregation.token_mean
        )
        return self.update(mini_batches, steps, language_loss)

    def update_dpo(self, batch: Batch, loss: DPOLossConfig) -> Metrics:
        mini_batches = self.mini_batches(batch, pairs_of(batch, ("ref_log_probs",)))
        steps = mini_batches.pair_steps(self.config.passes_per_batch, self.update_seed)
        return self.update(mini_batches, steps, dpo_loss(loss), self.temperature)

    def update_distilled(self, batch: Batch) -> Metrics:
        mini_batches = self.mini_batches(batch, sequences_of(batch, ("teacher_log_probs",)))
        # From the second step on the policy is no longer the one that sampled.
        if self.config.passes_per_batch * mini_batches.num_labels > 1:
            self.add_old_log_probs(batch, mini_batches)
        steps = mini_batches.steps(
            self.config.passes_per_batch, self.update_seed, Aggregation.token_mean
        )
        return self.update(mini_batches, steps, distillation_loss, self.temperature)

    def update(
        self,
        mini_batches: MiniBatches,
        steps: Iterable[Sequences],
        loss_fn: LossFn,
        temperature: float = 1.0,
    ) -> Metrics:
        """Takes one optimizer step for each of `steps`; none where no rank has a row.

        No row is left when no prompt's best answer was good enough. The optimizer's momentum alone
        would then move the weights.
        """
        if not mini_batches.num_rows:
            return Metrics({f"{self.prefix}/updates_without_rows": 1.0})
        metrics = super().update(mini_batches, steps, loss_fn, temperature)
        return metrics | {f"{self.prefix}/weight_version": float(self.weight_version)}

    def add_old_log_probs(self, batch: Batch, mini_batches: MiniBatches) -> None:
        """Adds the column old_log_probs, the log-probs before this update: those of `batch`, or
        computed now.

        Ratios are taken between numbers of the training engine: the generation engine's round
        differently.
        """
        mini_batches.add_columns(old_log_probs=self._old_log_probs(batch, mini_batches.sequences))

    def add_routes(self, mini_batches: MiniBatches) -> None:
        """Has every pass of the update send tokens to the experts to which the present weights send
        them."""
        self.to_training()
        outputs = self.engine.forward(
            mini_batches.sequences, temperature=self.temperature, routes=True
        )
        assert outputs is not None, "routes are on every rank"
        mini_batches.sequences = replace(mini_batches.sequences, routes=outputs.routes)

    def _old_log_probs(self, batch: Batch, sequences: Sequences) -> Tensor:
        if "log_probs" in batch:
            return batch.ragged("log_probs").values
        self.to_training()
        outputs = self.engine.forward(sequences, temperature=self.temperature)
        if outputs is None or outputs.log_probs is None:
            return torch.zeros(sequences.num_scored_tokens)
        return outputs.log_probs.cpu()
