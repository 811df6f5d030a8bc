"""PreferenceWorker: a reward or cost model while it is trained on preference pairs.

RewardWorker and its neighbours (reward.py) hold the frozen model that scores responses.
"""

from __future__ import annotations

import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.engines.base import Head, LossFn
from workers.losses.preference import bradley_terry_loss, cost_model_loss
from workers.model_worker import pairs_of, sequences_of
from workers.role_config import PreferenceConfig
from workers.roles import PreferenceModel
from workers.sequences import Sequences
from workers.trained_worker import TrainedWorker


class PreferenceWorker(TrainedWorker, PreferenceModel):
    config: PreferenceConfig
    prefix = "reward_model"

    def __init__(self, config: PreferenceConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(self.config.model, self.config.train, Head.score, context, seed=config.seed)

    def compute_scores(self, batch: Batch) -> Batch:
        self.to_training()
        outputs = self.engine.forward(self.to_score(sequences_of(batch)))
        if outputs is None or outputs.scores is None:
            return Batch.of(scores=torch.empty(0))
        return Batch.of(scores=outputs.scores.cpu())

    def update_preferences(self, batch: Batch) -> Metrics:
        return self._update(batch, self.to_score(pairs_of(batch)), bradley_terry_loss)

    def update_costs(self, batch: Batch) -> Metrics:
        sequences = pairs_of(batch).with_columns(per_row={"harm_sign": batch.tensor("harm_sign")})
        return self._update(batch, self.to_score(sequences), cost_model_loss)

    def _update(self, batch: Batch, sequences: Sequences, loss_fn: LossFn) -> Metrics:
        mini_batches = self.mini_batches(batch, sequences)
        return self.update(mini_batches, mini_batches.pair_steps(1, self.update_seed), loss_fn)
