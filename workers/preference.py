"""PreferenceWorker: a reward or cost model while it is trained on preference pairs. RewardWorker (reward.py)
is its frozen form."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.engines.base import Head, LossFn
from workers.losses.preference import bradley_terry_loss, cost_model_loss
from workers.mini_batches import MiniBatches, mean_over_steps, train_on
from workers.model_worker import ModelWorker, pairs_of, sequences_of
from workers.role_config import PreferenceConfig
from workers.roles import PreferenceModel
from workers.sequences import Sequences


class PreferenceWorker(ModelWorker, PreferenceModel):
    config: PreferenceConfig

    def __init__(self, config: PreferenceConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(config.model, config.train, Head.score, context, seed=config.seed)

    def compute_scores(self, batch: Batch) -> Batch:
        outputs = self.engine.forward(sequences_of(batch))
        return Batch.of(
            scores=torch.empty(0) if outputs is None or outputs.scores is None else outputs.scores.cpu()
        )

    def update_preferences(self, batch: Batch) -> Metrics:
        return self._train(batch, pairs_of(batch), bradley_terry_loss)

    def update_costs(self, batch: Batch) -> Metrics:
        sequences = pairs_of(batch).with_columns(per_row={"harm_sign": batch.tensor("harm_sign")})
        return self._train(batch, sequences, cost_model_loss)

    def _train(self, batch: Batch, sequences: Sequences, loss_fn: LossFn) -> Metrics:
        labels = cast(Tensor, batch["mini_batch"]) if "mini_batch" in batch else None
        mini_batches = MiniBatches(sequences, labels, self.layout, self.context.device)
        return mean_over_steps(train_on(self.engine, mini_batches.pair_steps(1, 0), loss_fn), "reward_model")
