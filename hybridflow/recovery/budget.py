"""How often a run may start again: by the controller after a failure, by the supervisor after the
controller's end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridflow.recovery.actions import Exit
from hybridflow.recovery.events import Failure, Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Restarts without progress; progress is a commit of a step that was never committed before.

    budget = Budget(max_restarts=3).progressed(12)
    budget, refusal = budget.spend(failure)     # "" or the reason to give up
    """

    max_restarts: int
    restarts: int = 0
    """Since the last progress."""
    furthest: int = -1
    """The highest step that was ever committed."""
    last: Failure | None = None

    def progressed(self, step: int) -> Budget:
        if step <= self.furthest:
            return self
        return replace(self, furthest=step, restarts=0)

    def spend(self, failure: Failure) -> tuple[Budget, str]:
        """The budget after one restart more, and the reason not to do it, empty where there is
        none."""
        if failure.kind is Kind.user_error:
            return self, f"{failure.cause}: the same again would fail again"
        if failure.same_as(self.last):
            return self, f"the same failure twice: {failure.cause}"
        if self.restarts >= self.max_restarts:
            return self, (
                f"{self.restarts} restarts without a new step, as many as recovery.max_restarts "
                "allows"
            )
        return replace(self, restarts=self.restarts + 1, last=failure), ""


FINAL = frozenset(
    {Exit.done, Exit.user_error, Exit.preempted, Exit.other_layout, Exit.fenced, Exit.gave_up}
)
"""Exits after which a supervisor ends with the same status. Those that ask for another start ask
the scheduler above it, or a person: the same command here would end the same way."""


def after_exit(budget: Budget, status: int, *, furthest: int) -> tuple[Budget, str]:
    """A supervisor's decision after its controller ended with `status` (negative: a signal):
    the budget for the next attempt and "", or the reason to end with the same status.

    furthest: the newest step that the attempt committed, in memory or on disk.
    """
    budget = budget.progressed(furthest)
    if status in FINAL:
        return budget, f"the controller ended with {Exit(status).name} ({status})"
    return budget.spend(Failure(kind=Kind.died, role="controller", cause=f"exit status {status}"))
