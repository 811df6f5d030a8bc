"""Outcome: the result of a run, and how the numbers of its steps are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path
from statistics import median

from hybridflow.calls import CallRecord
from hybridflow.metrics.jsonl import METRICS, read_jsonl

SECONDS = "seconds/"
"""Metrics under this prefix are a step's seconds by call; seconds/step is all of it."""


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
    """Seconds in the steps of the whole run, those before a resume as metrics.jsonl has them;
    validation and checkpoints are not counted."""
    tokens: float
    """Tokens of prompts and responses that these steps trained on."""
    largest: dict[str, float]
    """Over these steps, the largest value of every metric whose name ends in "max", such as
    actor/log_prob_gap_max."""
    phase_s: dict[str, float]
    """Seconds per phase, summed over steps."""
    median_s: dict[str, float]
    """Median seconds per phase and of the whole step ("step"), without the first step, which
    also warms up."""

    @staticmethod
    def of(
        num_steps: int,
        steps: Sequence[TrainedStep],
        before: Mapping[str, float],
        after: Mapping[str, float],
        reward: str,
    ) -> Outcome:
        """That of these steps, oldest first; `before` and `after`: validation's numbers, of which
        `reward` is the mean reward's name."""
        return Outcome(
            num_steps=num_steps,
            reward_before=before.get(reward),
            reward_after=after.get(reward),
            validation_before=dict(before),
            validation_after=dict(after),
            train_s=sum(step.seconds for step in steps),
            tokens=sum(step.tokens for step in steps),
            largest=reduce_by_name(max, [step.maxima for step in steps]),
            phase_s=reduce_by_name(add, [step.phases for step in steps]),
            median_s=median_seconds([step.phases | {"step": step.seconds} for step in steps]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStep:
    """A step of the run, as the outcome counts it."""

    step: int
    seconds: float
    tokens: float
    phases: dict[str, float]
    """Seconds by call."""
    maxima: dict[str, float]
    """Its metrics whose name ends in "max"."""


def logged_steps(output_dir: Path) -> list[TrainedStep]:
    """The steps that metrics.jsonl has, oldest first; none where the run writes no such file."""
    path = output_dir / METRICS
    if not path.is_file():
        return []
    steps = {}
    for row in read_jsonl(path):
        if row["split"] != "train" or f"{SECONDS}step" not in row:
            continue
        phases, maxima = {}, {}
        for name, value in row.items():
            if name.startswith(SECONDS):
                phases[name.removeprefix(SECONDS)] = value
            elif name.endswith("max"):
                maxima[name] = value
        seconds = phases.pop("step")
        steps[row["step"]] = TrainedStep(
            step=row["step"],
            seconds=seconds,
            tokens=round(row["tokens_per_s"] * seconds, 3),
            phases=phases,
            maxima=maxima,
        )
    return [steps[number] for number in sorted(steps)]


def nothing_to_do(output_dir: Path, step: int) -> str:
    """In words: the run is finished."""
    return (
        f"nothing to do: the run of {output_dir} is finished after {step} steps; raise loop.num_steps "
        "(or num_epochs, stop_at_reward) to go on, or set another output_dir (or loop.resume=never) "
        "to start anew"
    )


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
