"""Vitals: numbers of a run as a whole, beside those of its steps: failures, recoveries, commits.

They are counted from events.jsonl, so they go on where the controller before this one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VITALS = {
    "step": "the last step that was trained",
    "staged_step": "the newest step whose snapshot is in memory; -1: none",
    "durable_step": "the newest step that is on disk; -1: none",
    "starts": "controllers that began or took over the run",
    "failures": "failures of workers, nodes and controllers",
    "recoveries": "failures that the run went on after",
    "recovery_seconds": "how long the last recovery took; 0: none yet",
    "recovery_seconds_sum": "how long all recoveries took together",
    "lost_steps": "steps that were trained and taken back",
    "restarts_without_progress": "recoveries since the last new commit; recovery.max_restarts ends the run",
}
"""Name and meaning of each, all of them known from a run's start to its end."""


class Vitals:
    """vitals = Vitals(); vitals.count(event)        # of each event of events.jsonl, in order
    vitals.values["recoveries"]
    """

    def __init__(self) -> None:
        self.values = dict.fromkeys(VITALS, 0.0)
        self.values |= {"staged_step": -1.0, "durable_step": -1.0}
        self._down_since: float | None = None
        """When the controller died that the next one takes over from."""

    def count(self, event: Mapping[str, Any]) -> None:
        """Takes an event as EventLog writes it."""
        kind = event["event"]
        if kind == "failure":
            self.values["failures"] += 1
            if event["role"] == "controller":
                self._down_since = event["time_s"]
        elif kind == "started":
            self.values["starts"] += 1
            if self._down_since is not None:
                self._recovered(event["time_s"] - self._down_since)
        elif kind == "recovered":
            self._recovered(event["total_s"])
            self.values["lost_steps"] += event["lost_steps"]
        elif kind == "rewound":
            self.values["lost_steps"] += event["lost_steps"]

    def _recovered(self, seconds: float) -> None:
        self.values["recoveries"] += 1
        self.values["recovery_seconds"] = seconds
        self.values["recovery_seconds_sum"] += seconds
        self._down_since = None
