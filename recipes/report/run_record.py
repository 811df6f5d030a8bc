"""RunRecord: what a run's directory says, read without torch or Ray.

Every file but metrics.jsonl may be missing: a run that is under way, or that was killed, is read as
far as it went.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridflow.failures import EVENTS
from hybridflow.metrics.jsonl import RESERVED, SAMPLES, read_jsonl, read_samples
from hybridflow.trace_file import TRACE

HOSTS = "hosts.jsonl"
LOST = "lost"
"""The directory of metrics that a recovery took back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """record = RunRecord.read(Path("outputs/ppo")); record.values("train", "reward/mean")"""

    directory: Path
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl: step, split, time_s and metrics."""
    lost: Sequence[Mapping[str, Any]] = ()
    """Rows of steps that were trained, lost with a failure, and trained again."""
    samples: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    hosts: Sequence[Mapping[str, Any]] = ()
    """hosts.jsonl: looks at all hosts between steps."""
    slices: Sequence[Mapping[str, Any]] = ()
    """trace.json: calls of hosts and the controller, in microseconds."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    mapping: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""
    """config.yaml."""

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """Raises a ValueError where the directory holds no run."""
        metrics = directory / "metrics.jsonl"
        if not metrics.is_file():
            raise ValueError(
                f"{directory}: no metrics.jsonl, so this is no run's output_dir (or it was run "
                "with metrics.jsonl=false)"
            )
        lost: list[dict[str, Any]] = []
        for path in sorted((directory / LOST).glob("*.jsonl")):
            lost += read_jsonl(path)
        settings = directory / "config.yaml"
        return cls(
            directory=directory,
            rows=read_jsonl(metrics),
            lost=lost,
            samples=list(map(_with_numbers, _lines(directory / SAMPLES))),
            events=_lines(directory / EVENTS),
            hosts=_lines(directory / HOSTS),
            slices=_trace(directory / TRACE),
            summary=_object(directory / "summary.json"),
            mapping=_object(directory / "mapping.json"),
            environment=_object(directory / "environment.json"),
            settings=settings.read_text() if settings.is_file() else "",
        )

    def of_split(self, split: str, *, lost: bool = False) -> list[Mapping[str, Any]]:
        rows = self.lost if lost else self.rows
        return [row for row in rows if row["split"] == split]

    def points(self, split: str, metric: str, *, lost: bool = False) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was logged."""
        rows = self.of_split(split, lost=lost)
        return [(row["step"], row[metric]) for row in rows if metric in row]

    def values(self, split: str, metric: str) -> list[float]:
        return [value for _, value in self.points(split, metric)]

    def metrics(self) -> list[str]:
        """The names of all metrics, in the order in which they were first logged."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row))
        return [name for name in names if name not in RESERVED]


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_samples(path) if path.is_file() else []


def _with_numbers(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with rewards that JSON can't hold (NaN) as numbers again."""
    for name, value in sample.items():
        if name.partition("/")[0] == "reward":
            sample[name] = float(value)
    return sample


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it and try again") from error
    return value


def _trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, whose array a run never closes: one event a line after the first."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text().splitlines()[1:]:
        text = line.rstrip().rstrip(",")
        if text.endswith("}"):
            events.append(json.loads(text))
    return events
