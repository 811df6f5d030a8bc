"""What a run would ask of a GPU, counted without one.

    python -m benchmarks.rehearsal [--json FILE]        # four minutes on two cores

Every training engine runs as rank 0 of a world on a hollow GPU (hollow.py): operations of a host
tensor with a device tensor fail there, and launches, host synchronisations and copies are counted.
Models of full width, with some of their layers, play rank 1: peak bytes of a training step beside the
mapper's footprint (memory.py). Each case is a process of its own, so many at a time as there are
cores. A case that fails is a row with its error, the others go on, and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.memory_cases import LAYERS

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600.0
"""Of one case, which takes half a minute of a core."""
CASES = (
    ("fsdp", "1"),
    ("fsdp", "8"),
    ("fsdp", "8", "experts"),
    ("fsdp", "8", "experts", "ep=4"),
    ("fsdp", "8", "images"),
    ("fsdp", "8", "episodes"),
    ("fsdp", "8", "lora=8"),
    ("fsdp", "4", "cp=2"),
    ("fsdp", "4", "cp=2", "cp_exchange=allgather"),
    ("fsdp", "4", "cp=2", "cp_exchange=ring"),
    ("threed", "1"),
    ("threed", "4", "tp=2"),
    ("threed", "4", "experts", "ep=4"),
    ("threed", "4", "cp=2"),
    ("threed", "2", "images"),
    ("deepspeed", "1", "zero_stage=2"),
    ("deepspeed", "1", "zero_stage=3"),
)
Row = dict[str, Any]


def run_case(directory: Path, *case: str) -> list[Row]:
    """The rows of one engine and world, from a process of its own; its error is a RuntimeError."""
    return run_module("benchmarks.rehearsal.case", str(directory), *case)


def run_memory(directory: Path, case: str, layers: int) -> Row:
    """The row of one case of memory.py, with so many layers."""
    module = "benchmarks.rehearsal.memory"
    (row,) = run_module(module, str(directory), case, "--layers", str(layers))
    return row


def run_module(module: str, *arguments: str) -> list[Row]:
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments[1:])}: {run.stderr[-3000:]}")
    rows: list[Row] = json.loads(run.stdout.splitlines()[-1])
    return rows


def attempted(name: str, run: Callable[[], list[Row]]) -> list[Row]:
    """Its rows, or one with its error."""
    try:
        return run()
    except subprocess.TimeoutExpired:
        return [{"stage": "A", "case": name, "error": f"not finished within {TIMEOUT_S:.0f} s"}]
    except RuntimeError as error:
        return [{"stage": "A", "case": name, "error": str(error)}]


def line_of(row: Row) -> str:
    """A line of the table."""
    if "error" in row:
        reason = row["error"].strip().splitlines()[-1]
        return f"{row['case']:<50} failed: {reason}"
    layers = f", {row['layers']} layers" if "layers" in row else ""
    counts = f"{row['launches']:>10.1f}{row['syncs']:>8.1f}{row['copies']:>8.1f}"
    predicted = row["predicted_bytes"]
    beside = "" if predicted is None else f"{predicted / 1e9:>11.2f}"
    return f"{row['case'] + layers:<58}{counts}{row['peak_bytes'] / 1e9:>10.4f}{beside}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the rows here too")
    parser.add_argument(
        "--only", default="", help="only cases whose name has this text, such as 'fsdp 8'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    arguments = parser.parse_args()
    rows: list[Row] = []
    print(f"{'case':<58}{'launches':>10}{'syncs':>8}{'copies':>8}{'peak':>10}{'predicted':>11}  GB")
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(arguments.jobs) as processes,
    ):
        runs: list[tuple[str, Callable[[], list[Row]]]] = []
        for number, case in enumerate(CASES):
            runs.append((" ".join(case), partial(run_case, Path(folder, str(number)), *case)))
        runs.append(("decoding", partial(run_module, "benchmarks.rehearsal.decoding")))
        for name, layers in LAYERS.items():
            runs.append((name, partial(_memory_rows, Path(folder, f"memory {name}"), name, layers)))
        chosen = [(name, run) for name, run in runs if arguments.only in name]
        for some in processes.map(attempted, *zip(*chosen, strict=True)) if chosen else ():
            rows += some
            for row in some:
                print(line_of(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        parser.error(f"--only is {arguments.only!r}; cases: {', '.join(name for name, _ in runs)}")
    failed = [row["case"] for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _memory_rows(directory: Path, case: str, layers: int) -> list[Row]:
    return [run_memory(directory, case, layers)]


if __name__ == "__main__":
    main()
