"""Outcome: the result of a run, and how the numbers of its steps are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from hybridflow.calls import CallRecord


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run."""

    num_steps: int
    """The last step that was trained."""
    reward_before: float | None
    """Validation's mean reward before the first step of the whole run, and after the last; null
    where it has none."""
    reward_after: float | None
    validation_before: dict[str, float]
    """All of validation's numbers."""
    validation_after: dict[str, float]
    train_s: float
    """Seconds in the steps of this process, validation and checkpoints not counted."""
    tokens: float
    """Tokens of prompts and responses that these steps trained on."""
    largest: dict[str, float]
    """Over these steps, the largest value of every metric whose name ends in "max", such as
    actor/log_prob_gap_max."""
    phase_s: dict[str, float]
    """Seconds per phase, summed over steps."""
    median_s: dict[str, float]
    """Median seconds per phase and of the whole step ("step"), without this process' first
    step, which also warms up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStep:
    """A step that this process trained, as the outcome counts it."""

    step: int
    seconds: float
    tokens: float
    phases: dict[str, float]
    """Seconds by call."""
    maxima: dict[str, float]
    """Its metrics whose name ends in "max"."""


def phase_seconds(records: list[CallRecord]) -> dict[str, float]:
    """Seconds of every call of a step, by role.method; calls of one name are added."""
    phases: dict[str, float] = {}
    for record in records:
        name = f"{record.role}.{record.method}"
        phases[name] = phases.get(name, 0.0) + record.seconds
    return phases


def peak_memory(records: list[CallRecord]) -> dict[str, float]:
    """The most memory of any process of each pool, as the metrics memory/<pool>/host_peak_bytes and,
    on GPUs, memory/<pool>/device_peak_bytes."""
    peaks: dict[str, float] = {}
    for record in records:
        for host, device in record.peak_bytes:
            for kind, size in (("host", host), ("device", device)):
                name = f"memory/{record.pool}/{kind}_peak_bytes"
                if size:
                    peaks[name] = max(peaks.get(name, 0.0), float(size))
    return peaks


def reduce_by_name(
    combine: Callable[[float, float], float], rows: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Each name's values of all rows, combined."""
    result: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            result[name] = combine(result[name], value) if name in result else value
    return result


def median_seconds(steps: list[dict[str, float]]) -> dict[str, float]:
    """Each phase's median over the steps after the first; the first step's where it is the only
    one."""
    seconds: dict[str, list[float]] = {}
    for step in steps[1:] or steps:
        for name, value in step.items():
            seconds.setdefault(name, []).append(value)
    return {name: median(of_steps) for name, of_steps in seconds.items()}
