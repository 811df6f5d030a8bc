"""LoopConfig: the settings loop.*."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from controllers.run_length import RunLength
from workers.generation.config import SamplingConfig


@dataclass(kw_only=True)
class LoopConfig:
    """How long, how often."""

    num_steps: int | None = None
    """Steps of the whole run; a step trains on data.batch_size rows (prompts x
    algorithm.samples_per_prompt responses, demonstrations, or pairs). null: as many as
    num_epochs needs, or 100 where that is null too."""
    num_epochs: int | None = None
    """Passes over data.train, in place of num_steps: each row is used so many times, and the
    last step takes what is left."""
    validate_every: int = 10
    """Steps between validations; 0: only before the first and after the last step."""
    validation_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(greedy=True))
    """How validation samples its responses; max_response_tokens is always that of training."""
    checkpoint_every: int = 0
    """Steps between checkpoints on disk, which are written in the background; 0: only after the
    last step."""
    checkpoint_minutes: float = 0.0
    """A step is checkpointed as well when the last checkpoint is this old; 0: never for that."""
    export_every: int = 0
    """Steps between checkpoints that also hold the model as a Hugging Face directory, which takes
    longest to write; 0: only those after the last step and of the best validation so far."""
    keep_last: int = 2
    """Checkpoints kept, besides the best."""
    keep_best: int = 1
    """Checkpoints kept for their validation, the best ones."""
    resume: str = "auto"
    """auto: from the latest checkpoint in the output directory if there is one; never: start
    anew; or a checkpoint's directory."""
    stop_at_reward: float | None = None
    """End the run once a validation's mean reward reaches this."""

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"loop.num_steps is {self.num_steps} and loop.num_epochs is {self.num_epochs}; "
                "set one of them, and the other to null"
            )
        for name, value in (
            ("num_steps", self.num_steps),
            ("num_epochs", self.num_epochs),
            ("keep_last", self.keep_last),
        ):
            if value is not None and value < 1:
                raise ValueError(f"loop.{name} is {value}; use at least 1")
        if self.stop_at_reward is not None and not math.isfinite(self.stop_at_reward):
            raise ValueError(
                f"loop.stop_at_reward is {self.stop_at_reward}; use a finite number, or null"
            )
        intervals: tuple[tuple[str, float], ...] = (
            ("validate_every", self.validate_every),
            ("checkpoint_every", self.checkpoint_every),
            ("checkpoint_minutes", self.checkpoint_minutes),
            ("export_every", self.export_every),
            ("keep_best", self.keep_best),
        )
        for name, interval in intervals:
            if interval < 0:
                raise ValueError(f"loop.{name} is {interval}; use 0 or more")

    def length(self, num_rows: int, batch_size: int) -> RunLength:
        """When the run ends on a dataset of `num_rows` rows."""
        return RunLength.of(
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            num_rows=num_rows,
            batch_size=batch_size,
        )
