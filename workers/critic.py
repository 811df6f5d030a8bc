"""CriticWorker: the value model over a training engine."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.engines.base import Head
from workers.losses.value import value_loss
from workers.mini_batches import MiniBatches, mean_over_steps, train_on
from workers.model_worker import ModelWorker, sequences_of
from workers.role_config import CriticConfig
from workers.roles import Critic


class CriticWorker(ModelWorker, Critic):
    config: CriticConfig

    def __init__(self, config: CriticConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(config.model, config.train, Head.value, context, seed=config.seed)
        self.num_updates = 0

    def compute_values(self, batch: Batch) -> Batch:
        outputs = self.engine.forward(sequences_of(batch))
        return self.scored(batch, outputs.values if outputs else None, "values")

    def update_critic(self, batch: Batch) -> Metrics:
        config = self.config
        labels = cast(Tensor, batch["mini_batch"]) if "mini_batch" in batch else None
        sequences = sequences_of(batch, per_token=("returns", "values"))
        mini_batches = MiniBatches(sequences, labels, self.layout, self.context.device)
        steps = mini_batches.steps(
            config.num_epochs, self.num_updates, config.loss.aggregation, config.loss.aggregation_constant
        )
        metrics = train_on(self.engine, steps, value_loss(config.loss))
        self.num_updates += 1
        return mean_over_steps(metrics, "critic")
