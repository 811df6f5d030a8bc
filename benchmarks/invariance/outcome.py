"""Reads what a run of benchmarks.invariance logged and saved, and compares it with the
reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.invariance import case
from benchmarks.invariance.reference import Numbers, Rows
from hybridflow.snapshots.reading import SnapshotFiles


def numbers(algorithm: str, directory: Path, output: Path) -> dict[str, Numbers]:
    """Metrics and changes of a finished run."""
    logged: dict[str, Any] = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    return {
        role: Numbers(
            loss=logged[f"{role}/loss"],
            grad_norm=logged[f"{role}/grad_norm"],
            change=change(directory / case.STARTS[role], checkpoint / role),
        )
        for role in case.TRAINED[algorithm]
    }


def change(start: Path, checkpoint: Path) -> dict[str, Tensor]:
    """The change of every parameter, from the files of the run's checkpoint."""
    before = load_file(start / "model.safetensors")
    after = SnapshotFiles(checkpoint)
    changes = {}
    for name, value in before.items():
        changes[name] = after.whole(f"model.{name}").double() - value.double()
    return changes


def rollouts(output: Path) -> Rows:
    """The rows that the reward function saw, in an order that does not depend on the rank that
    generated them."""
    rows: Rows = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["number"], row["response"]))


def errors(actual: dict[str, Numbers], expected: dict[str, Numbers]) -> dict[str, float]:
    """Relative errors of loss, gradient norm and update, the largest over the roles that learn."""
    pairs = [(actual[role], expected[role]) for role in expected]
    return {
        "loss_error": max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs),
        "grad_norm_error": max(abs(a.grad_norm - b.grad_norm) / abs(b.grad_norm) for a, b in pairs),
        "update_error": max(distance(a.change, b.change) for a, b in pairs),
    }


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean distance of two updates, relative to the length of the second."""
    if actual.keys() != expected.keys():
        raise ValueError(
            f"the two models have different parameters: {sorted(actual.keys() ^ expected.keys())}"
        )
    difference, length = 0.0, 0.0
    for name, value in expected.items():
        difference += float((actual[name] - value).square().sum())
        length += float(value.square().sum())
    return (difference / length) ** 0.5
