"""The training engine of the disturbed runs: fsdp, with updates that raise on demand."""

from __future__ import annotations

from benchmarks.chaos.marks import RAISE, take
from workers.engines.base import LossFn, Sequences
from workers.engines.fsdp.engine import FsdpEngine


class RaisingEngine(FsdpEngine):
    def train_step(
        self,
        sequences: Sequences,
        loss_fn: LossFn,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        metrics = super().train_step(sequences, loss_fn, entropy=entropy, temperature=temperature)
        if take(f"{RAISE}{self.context.rank}"):
            raise RuntimeError("raised on demand, after the weights moved")
        return metrics
