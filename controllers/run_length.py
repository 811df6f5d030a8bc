"""RunLength: after how many steps, or rows, a run ends."""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.wording import counted

DEFAULT_NUM_STEPS = 100
"""Steps of a run that names neither steps nor epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """RunLength.of(num_steps=None, num_epochs=3, num_rows=1000, batch_size=128) is 24 steps,
    the last one with 56 rows, after which every row was used three times."""

    num_steps: int
    batch_size: int
    row_limit: int | None = None
    """Rows of the stream after which the run ends, whatever number of steps took them; null
    where num_steps decides. A step that draws further prompts (DAPO) uses them up faster."""

    @staticmethod
    def of(
        *, num_steps: int | None, num_epochs: int | None, num_rows: int, batch_size: int
    ) -> RunLength:
        """From loop.num_steps and loop.num_epochs, of which one at most is set."""
        if num_epochs is None:
            return RunLength(num_steps=num_steps or DEFAULT_NUM_STEPS, batch_size=batch_size)
        row_limit = num_epochs * num_rows
        return RunLength(
            num_steps=-(-row_limit // batch_size), batch_size=batch_size, row_limit=row_limit
        )

    def reached(self, step: int, position: int) -> bool:
        """Whether a run ends that has taken `step` steps and `position` rows."""
        if self.row_limit is None:
            return step >= self.num_steps
        return position >= self.row_limit

    def next_rows(self, position: int) -> int:
        """Rows of the next step; the last one of the last epoch takes what is left."""
        if self.row_limit is None:
            return self.batch_size
        return min(self.batch_size, self.row_limit - position)

    def __str__(self) -> str:
        text = f"{counted(self.num_steps, 'steps')} of {counted(self.batch_size, 'rows')}"
        if self.row_limit is None:
            return text
        last = self.row_limit - (self.num_steps - 1) * self.batch_size
        if last == self.batch_size:
            return text
        if self.num_steps == 1:
            return f"1 step of {counted(last, 'rows')}"
        return f"{text}, the last of {last}"
