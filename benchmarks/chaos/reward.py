"""The reward of the disturbed runs; it differs between responses, and its process dies on demand."""

from __future__ import annotations

import os
import signal

from benchmarks.chaos.marks import REWARD_TASK, take


def by_length(*, response: str, **columns: object) -> float:
    if take(REWARD_TASK):
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(response) % 5)
