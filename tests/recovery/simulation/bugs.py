"""Mistakes to plant, each of which the simulation must find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridflow.checkpoint import CheckpointStore
from hybridflow.recovery.attempts import Attempt


@dataclass(frozen=True, slots=True)
class Bugs:
    """Mistakes that a driver or a store could make; the simulation must find each of them."""

    prune_early: bool = False
    """Older commits are removed before the new one is there."""
    cursor_ahead: bool = False
    """The commit holds the position of rows that were drawn but not trained."""
    no_fence: bool = False
    no_forced_sync: bool = False
    no_rename_sync: bool = False
    """Names are not synced."""
    no_file_sync: bool = False
    ledger_not_synced: bool = False
    """The commit does not sync the ledger first."""
    forgets_given_up: bool = False
    """After going back the rows of a step that was given up are trained again."""
    export_not_tried_again: bool = False
    """Nobody hears of an export that the disk refused, nor of a commit without it."""


class PruningEarly(CheckpointStore):
    def begin(self, step: int) -> Any:
        for checkpoint in self.all():
            self._disk.remove(checkpoint.path)
        return super().begin(step)


class Unfenced(Attempt):
    def check(self) -> None:
        pass
