"""What a run would ask of a GPU, counted without one.

    python -m benchmarks.rehearsal [--json FILE]        # five minutes on two cores

Every training engine runs as rank 0 of a world on a hollow GPU (hollow.py): operations of a host
tensor with a device tensor fail there, and launches, host synchronisations and copies are counted.
Models of full width, with some of their layers, play rank 1: peak bytes of a training step beside the
mapper's footprint (memory.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.memory_cases import LAYERS

ROOT = Path(__file__).parents[2]
CASES = (
    ("fsdp", "1"),
    ("fsdp", "8"),
    ("fsdp", "8", "experts"),
    ("fsdp", "8", "episodes"),
    ("fsdp", "8", "lora=8"),
    ("fsdp", "4", "cp=2"),
    ("threed", "1"),
    ("threed", "4", "tp=2"),
    ("deepspeed", "1", "zero_stage=2"),
    ("deepspeed", "1", "zero_stage=3"),
)


def run_case(directory: Path, *case: str) -> list[dict[str, Any]]:
    """The rows of one engine and world, from a process of its own; its error is a RuntimeError."""
    return run_module("benchmarks.rehearsal.case", str(directory), *case)


def run_memory(directory: Path, case: str, layers: int) -> dict[str, Any]:
    """The row of one case of memory.py, with so many layers."""
    directory.mkdir(exist_ok=True)
    module = "benchmarks.rehearsal.memory"
    (row,) = run_module(module, str(directory), case, "--layers", str(layers))
    return row


def run_module(module: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments[1:])}: {run.stderr[-3000:]}")
    rows: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the rows here too")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            rows += run_case(Path(directory), *case)
        memory = [run_memory(Path(directory, "memory"), *case) for case in LAYERS.items()]
    print(f"{'case':<58}{'launches':>10}{'syncs':>8}{'copies':>8}")
    for row in rows:
        print(f"{row['case']:<58}{row['launches']:>10.1f}{row['syncs']:>8.1f}{row['copies']:>8.1f}")
    print(f"{'case':<44}{'layers':>8}{'peak':>10}{'predicted':>11}  GB")
    for row in memory:
        measured, predicted = row["peak_bytes"] / 1e9, row["predicted_bytes"] / 1e9
        print(f"{row['case']:<44}{row['layers']:>8}{measured:>10.2f}{predicted:>11.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows + memory, indent=1) + "\n")


if __name__ == "__main__":
    main()
