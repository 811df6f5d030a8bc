"""ReferenceWorker: the frozen policy over a training engine's forward pass."""

from __future__ import annotations

from contextlib import nullcontext

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from workers.engines.base import Head
from workers.model_worker import ModelWorker, sequences_of
from workers.role_config import ReferenceConfig
from workers.roles import Reference


class ReferenceWorker(ModelWorker, Reference):
    """The frozen policy: log-probs of response tokens, [tokens] for each row, for the KL.

    reference = spawn(ReferenceWorker, pool, ReferenceConfig(model=...), role="reference")
    """

    config: ReferenceConfig

    def __init__(self, config: ReferenceConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.shares = self.share_base(self.config.model, self.config.train)
        """The policy's engine with its adapter left out, in place of a second model."""
        if not self.shares:
            self.build(self.config.model, self.config.train, Head.lm, context, trains=False)

    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        self.to_training()
        base = self.engine.base_only() if self.shares else nullcontext()
        with base:
            outputs = self.engine.forward(sequences_of(batch), temperature=self.config.temperature)
        return self.scored(batch, outputs.log_probs if outputs else None, "ref_log_probs")
