"""The reward of the disturbed runs; it differs between responses, and its process dies on demand."""

from __future__ import annotations

import os
import signal
from typing import Any

from benchmarks.chaos.marks import REWARD_TASK, take


def by_length(*, response: str, **columns: object) -> float:
    if take(REWARD_TASK):
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(response) % 5)


class Echo:
    """An environment that answers what the policy says, three times."""

    def reset(self, task: dict[str, Any]) -> None:
        self.turns = 0

    def step(self, action: str) -> tuple[str, bool, float]:
        self.turns += 1
        return f"You said {action!r}.", self.turns == 3, float(action.count("e")) + len(action) % 3
