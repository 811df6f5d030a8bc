"""CriticWorker: the value model over a training engine."""

from __future__ import annotations

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.engines.base import Head
from workers.losses.value import value_loss
from workers.model_worker import sequences_of
from workers.role_config import CriticConfig
from workers.roles import Critic
from workers.trained_worker import TrainedWorker


class CriticWorker(TrainedWorker, Critic):
    """The value model: a value for every response token, trained towards the returns.

    critic = spawn(CriticWorker, pool, CriticConfig(model=...), role="critic")
    """

    config: CriticConfig
    prefix = "critic"

    def __init__(self, config: CriticConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(self.config.model, self.config.train, Head.value, context, seed=config.seed)

    def compute_values(self, batch: Batch) -> Batch:
        self.to_training()
        outputs = self.engine.forward(sequences_of(batch))
        return self.scored(batch, outputs.values if outputs else None, "values")

    def update_critic(self, batch: Batch) -> Metrics:
        config, loss = self.config, self.config.loss
        mini_batches = self.mini_batches(batch, sequences_of(batch, ("returns", "values")))
        steps = mini_batches.steps(
            config.num_epochs, self.update_seed, loss.aggregation, loss.aggregation_constant
        )
        return self.update(mini_batches, steps, value_loss(loss))
