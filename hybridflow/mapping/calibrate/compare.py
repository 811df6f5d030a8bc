"""Predicted beside measured: seconds per phase of real runs and the mapper's, and whether it
ranks placements correctly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import table


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run that was both predicted and measured.

    Run(configuration="3M, 2 colocated", mapping=mapping, measured_s={"actor.generate_sequences": 1.9, ...},
    step_s=6.1)
    """

    configuration: str
    mapping: DeviceMapping
    measured_s: Mapping[str, float]
    """Role.method -> seconds of all its calls of a step (median over steps after warm-up)."""
    step_s: float
    """Measured seconds of a whole step."""
    compare_group: str = ""
    """Runs of one group differ only in their placement and are ranked against each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A phase of a run."""

    configuration: str
    phase: str
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.measured_s


def compare(run: Run) -> list[Comparison]:
    """Every call that was measured, in program order, and the whole step; an unknown call is an
    error."""
    known: dict[str, float] = {}
    for call in run.mapping.calls:
        phase = call.call.partition("#")[0]
        known[phase] = known.get(phase, 0.0) + call.seconds
    unknown = sorted(set(run.measured_s) - set(known))
    if unknown:
        raise ValueError(
            f"measured_s: {unknown} are no calls of {run.mapping.algorithm}; it has "
            f"{', '.join(known)}"
        )
    phases: dict[str, tuple[float, float]] = {}
    for name, seconds in known.items():
        if name in run.measured_s:
            phases[name] = (seconds, run.measured_s[name])
    phases["step"] = (run.mapping.step_s, run.step_s)
    rows = []
    for name, (predicted, measured) in phases.items():
        rows.append(
            Comparison(
                configuration=run.configuration,
                phase=name,
                predicted_s=predicted,
                measured_s=measured,
            )
        )
    return rows


def side_by_side(run: Run) -> str:
    """The table of predicted and measured seconds that is printed after a run."""
    rows = []
    for row in compare(run):
        difference = f"{row.ratio - 1:+.0%}"
        rows.append((row.phase, f"{row.predicted_s:.3g}", f"{row.measured_s:.3g}", difference))
    return table(("phase", "predicted s", "measured s", "difference"), rows)


def within(comparisons: Sequence[Comparison], tolerance: float) -> bool:
    """Whether every prediction is off by at most `tolerance` of the measured seconds."""
    return all(
        abs(row.predicted_s - row.measured_s) <= tolerance * row.measured_s for row in comparisons
    )


def order_agrees(runs: Sequence[Run], tie: float = 0.05) -> bool:
    """Whether in every group the predicted order of steps is the measured one; pairs measured
    within `tie` of each other count as equal."""
    for number, run in enumerate(runs):
        for other in runs[number + 1 :]:
            near = abs(run.step_s - other.step_s) <= tie * max(run.step_s, other.step_s)
            if near or run.compare_group != other.compare_group:
                continue
            if (run.step_s < other.step_s) != (run.mapping.step_s < other.mapping.step_s):
                return False
    return True


def save_runs(runs: Sequence[Run], path: Path) -> None:
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def load_runs(path: Path) -> list[Run]:
    runs = []
    for entry in json.loads(path.read_text()):
        mapping = DeviceMapping.from_json(entry["mapping"])
        runs.append(Run(**{**entry, "mapping": mapping}))
    return runs
