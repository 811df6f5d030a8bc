"""asynchrony.*: the settings of a run whose responses are drawn ahead of the steps that train on
them."""

from __future__ import annotations

from dataclasses import dataclass

from controllers.window import Window
from workers.generation.config import InFlight


@dataclass(kw_only=True)
class AsynchronyConfig:
    """asynchrony.staleness=1 actor.loss.rollout_correction.correction=truncate"""

    staleness: int = 0
    """How many steps generation may be ahead of training: (staleness + 1) * data.batch_size prompts
    are under way. 0: every step draws its own responses and waits for the longest."""
    look_ahead: float = 1.0
    """How far finished prompts may be taken before the oldest unfinished one, as a share of the
    prompts under way; 0: strictly in order. No response is trained on later than staleness +
    ceil((look_ahead * (staleness + 1) * data.batch_size - 1) / data.batch_size) updates after its
    first token, and the mean is `staleness`, whatever look_ahead is."""
    in_flight: InFlight = InFlight.recompute
    """The fate of responses that are being drawn when new weights come. recompute: they go on,
    and their keys and values are computed again; keep: they go on with the old ones; drain: new
    weights wait until there are none, and every step's responses are drawn by one version, together,
    in order: slower, and bit for bit repeatable."""
    slice_steps: int = 16
    """Most engine steps between two looks at what has finished; weights wait for two such slices."""

    def __post_init__(self) -> None:
        if self.slice_steps < 1:
            raise ValueError(f"asynchrony.slice_steps is {self.slice_steps}; use at least 1")
        if self.drains and self.look_ahead != 1.0:
            raise ValueError(
                f"asynchrony.look_ahead is {self.look_ahead}, which nothing reads with in_flight="
                "drain: it takes prompts strictly in order; leave it out"
            )
        self.window(1)

    @property
    def drains(self) -> bool:
        return self.in_flight is InFlight.drain

    def window(self, batch_size: int) -> Window:
        """The run's window; a ValueError for values out of range."""
        look_ahead = 0.0 if self.drains else self.look_ahead
        return Window(groups_per_step=batch_size, staleness=self.staleness, look_ahead=look_ahead)
