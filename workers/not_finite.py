"""NotFinite: what an update does with an optimizer step whose gradient norm is infinite or NaN.

An engine raises before it touches the weights, on every rank, because the norm is that of all
ranks; so every rank leaves out the same steps. Which rows it was, and going back, is left to the
controller (controllers/not_finite.py), which reads these metrics.
"""

from __future__ import annotations

from hybridflow.errors import NotFiniteError
from workers.config import OnNonfinite, OptimizerConfig

NOT_FINITE = "not_finite/"
SKIPPED = "not_finite/steps"
"""Metric: optimizer steps that were left out."""
REWIND = "not_finite/rewind"
"""Metric: 1 where the run must go back."""
MINI_BATCH = "not_finite/mini_batch_"
"""Beginning of a metric: how often the mini-batch with this number was left out."""


class NotFinite:
    """not_finite.begin_update()
    try:
        metrics = engine.train_step(rows, loss_fn)
        not_finite.succeeded()
    except NotFiniteError as error:
        metrics = not_finite.left_out(error, mini_batch)   # raises where the run is to stop
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.in_a_row = 0
        """Steps that were left out since the last one that was taken."""
        self.rewinds = False
        """Whether the rest of the update is not worth computing: the run goes back."""

    def begin_update(self) -> None:
        self.rewinds = False

    def succeeded(self) -> None:
        self.in_a_row = 0

    def left_out(self, error: NotFiniteError, mini_batch: int) -> dict[str, float]:
        """The metrics of a step that was left out. The error, with the mini-batch, where on_nonfinite
        or max_nonfinite say so."""
        config = self.config
        self.in_a_row += 1
        if config.on_nonfinite is OnNonfinite.stop:
            raise NotFiniteError(f"{error} (mini-batch {mini_batch}, on_nonfinite=stop)") from error
        if self.in_a_row > config.max_nonfinite:
            raise NotFiniteError(
                f"{error} (mini-batch {mini_batch}); {self.in_a_row} steps in a row, and "
                f"optimizer.max_nonfinite is {config.max_nonfinite}"
            ) from error
        self.rewinds = config.on_nonfinite is OnNonfinite.rewind
        metrics = {SKIPPED: 1.0, f"{MINI_BATCH}{mini_batch}": 1.0}
        if self.rewinds:
            metrics[REWIND] = 1.0
        return metrics
