"""What a run would ask of a GPU, counted without one.

    python -m benchmarks.rehearsal [--json FILE]        # two to four minutes on two cores

Every training engine runs as rank 0 of a world on a hollow GPU (hollow.py): operations of a host
tensor with a device tensor fail there, and launches, host synchronisations and copies are counted.
Peak bytes against the mapper's footprint are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = (
    ("fsdp", "1"),
    ("fsdp", "8"),
    ("threed", "1"),
    ("threed", "4", "tp=2"),
    ("deepspeed", "1", "zero_stage=2"),
    ("deepspeed", "1", "zero_stage=3"),
)


def run_case(directory: Path, *case: str) -> list[dict[str, Any]]:
    """The rows of one engine and world, from a process of its own; its error is a RuntimeError."""
    command = [sys.executable, "-m", "benchmarks.rehearsal.case", str(directory), *case]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(case)}: {run.stderr[-3000:]}")
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
    print(f"{'case':<58}{'launches':>10}{'syncs':>8}{'copies':>8}")
    for row in rows:
        print(f"{row['case']:<58}{row['launches']:>10.1f}{row['syncs']:>8.1f}{row['copies']:>8.1f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
