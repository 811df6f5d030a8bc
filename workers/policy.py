"""PolicyWorker: a language model that is trained on rows that are there: demonstrations, preference pairs, a
teacher's log-probs.

Generates nothing, so it holds no generation engine. ActorTrainingWorker (actor_training.py) adds the
policy-gradient update.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

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
from workers.mini_batches import MiniBatches, mean_over_steps, train_on
from workers.model_worker import ModelWorker, pairs_of, sequences_of
from workers.role_config import ActorConfig, PolicyConfig
from workers.roles import Policy
from workers.sequences import Sequences

STATE = "learner.json"


class PolicyWorker(ModelWorker, Policy):
    config: PolicyConfig | ActorConfig
    prefix: ClassVar[str] = "policy"
    """Of its metrics."""

    def __init__(self, config: PolicyConfig | ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(config.model, config.train, Head.lm, context)
        self.weight_version = 0
        """Updates so far."""

    def compute_log_prob(self, batch: Batch) -> Batch:
        self.to_training()
        outputs = self.engine.forward(sequences_of(batch), temperature=self.temperature)
        return self.scored(batch, outputs.log_probs if outputs else None, "log_probs")

    def update_supervised(self, batch: Batch) -> Metrics:
        mini_batches = self._mini_batches(batch, sequences_of(batch, ("loss_mask",)))
        steps = mini_batches.steps(self.config.num_epochs, self.weight_version, Aggregation.token_mean, 0)
        return self.learn(mini_batches, steps, language_loss)

    def update_dpo(self, batch: Batch, loss: DPOLossConfig) -> Metrics:
        mini_batches = self._mini_batches(batch, pairs_of(batch, ("ref_log_probs",)))
        steps = mini_batches.pair_steps(self.config.num_epochs, self.weight_version)
        return self.learn(mini_batches, steps, dpo_loss(loss), self.temperature)

    def update_distilled(self, batch: Batch) -> Metrics:
        sequences = sequences_of(batch, ("teacher_log_probs",))
        mini_batches = self._mini_batches(batch, sequences)
        if (
            self.config.num_epochs * mini_batches.num_labels > 1
        ):  # from the second step on the policy is no longer the one that sampled
            mini_batches.sequences = sequences.with_columns(
                per_token={"old_log_probs": self.old_log_probs(batch, sequences)}
            )
        steps = mini_batches.steps(self.config.num_epochs, self.weight_version, Aggregation.token_mean, 0)
        return self.learn(mini_batches, steps, distillation_loss, self.temperature)

    def save_checkpoint(self, directory: str) -> None:
        super().save_checkpoint(directory)
        if self.context.rank == 0:
            (Path(directory) / STATE).write_text(json.dumps(self.state()))

    def load_checkpoint(self, directory: str) -> None:
        super().load_checkpoint(directory)
        self.load_state(json.loads((Path(directory) / STATE).read_text()))

    def state(self) -> dict[str, int]:
        """Counters that training goes on from."""
        return {"weight_version": self.weight_version}

    def load_state(self, state: dict[str, int]) -> None:
        self.weight_version = state["weight_version"]

    def to_training(self) -> None:
        """Called before the training engine is used."""

    @property
    def temperature(self) -> float:
        """Of log-probs that stand beside another model's: the one that the responses were drawn at."""
        return 1.0

    def old_log_probs(self, batch: Batch, sequences: Sequences) -> Tensor:
        """The log-probs before this update: given, or computed now, while the weights are still those that
        generated.

        Ratios are taken between numbers of one engine: the generation engine's own round differently.
        """
        if "log_probs" in batch:
            return batch.ragged("log_probs").values
        self.to_training()
        outputs = self.engine.forward(sequences, temperature=self.temperature)
        if outputs is None or outputs.log_probs is None:
            return torch.zeros(sequences.num_scored_tokens)
        return outputs.log_probs.cpu()

    def _mini_batches(self, batch: Batch, sequences: Sequences) -> MiniBatches:
        labels = cast(Tensor, batch["mini_batch"]) if "mini_batch" in batch else None
        return MiniBatches(sequences, labels, self.layout, self.context.device)

    def learn(
        self,
        mini_batches: MiniBatches,
        steps: Iterator[Sequences],
        loss_fn: LossFn,
        temperature: float = 1.0,
    ) -> Metrics:
        """One optimizer step for each of `steps`; none where no rank has a row, as when no prompt's best
        answer was good enough: the optimizer's momentum alone would move the weights."""
        if not mini_batches.num_rows:
            return Metrics({f"{self.prefix}/updates_without_rows": 1.0})
        self.to_training()
        metrics = train_on(self.engine, steps, loss_fn, temperature=temperature)
        self.weight_version += 1
        return mean_over_steps(metrics, self.prefix) | {
            f"{self.prefix}/weight_version": float(self.weight_version)
        }
