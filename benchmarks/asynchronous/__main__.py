"""Steps with responses drawn ahead against synchronous ones: seconds, staleness, idle pools.

python -m benchmarks.asynchronous --json FILE [--only virtual]

In virtual time for 32 + 32 devices (virtual.py), and on two CPU processes with real models (real.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.asynchronous import real, virtual

COLUMNS = ("step_s", "staleness_mean", "staleness_max", "bound", "idle_generator", "idle_trainer")
CASES = [(0, ""), (1, "recompute"), (1, "keep"), (1, "drain"), (2, "recompute"), (2, "keep")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.asynchronous",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", choices=("virtual", "real"))
    parser.add_argument("--models", nargs="+", choices=sorted(real.MODELS), default=["tiny", "3m"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.only != "real":
        rows += virtual.table()
        for row in rows:
            show(row)
    if arguments.only != "virtual":
        for model in arguments.models:
            for number in arguments.cases:
                staleness, mode = CASES[number]
                with tempfile.TemporaryDirectory() as directory:
                    rows.append(
                        real.measure(Path(directory), model, staleness, mode, arguments.steps)
                    )
                show(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    numbers = " ".join(f"{name} {row[name]:.3g}" for name in COLUMNS)
    name = f"{row['mode']:<12} staleness {row['staleness']} look-ahead {row['look_ahead']}"
    print(f"{row['where']:<26} {name}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
