"""Marks: files by which a disturbance reaches code of the run, which takes each once."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = "HYBRIDFLOW_CHAOS"
"""Environment variable: the run's directory."""
MARKS = "marks"
REWARD_TASK = "reward-task"
"""The next task that scores rows is killed."""
RAISE = "raise-"
"""With a rank: its next update of the actor raises."""


def take(name: str) -> bool:
    """Whether the mark was there; it is gone now."""
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return False
    try:
        (Path(directory) / MARKS / name).unlink()
    except FileNotFoundError:
        return False
    return True
