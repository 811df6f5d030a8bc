"""Does every algorithm learn? Each trains on the quickstart's task with the same budget, through
its own recipe and command line.

python -m benchmarks.learning --json FILE [--plot PNG] [--algorithms ppo grpo ...] [--set NAME=VALUE
...]

Budget: 24 steps of 256 trained responses, two processes. The held-out accuracy is greedy, before
and after, with a validation every four steps for the curves. Ends with status 1 if an algorithm's
accuracy does not rise by at least CLEARLY.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.learning.picture import draw_curves
from benchmarks.learning.settings import COMMON, SETTINGS
from benchmarks.learning.teachers import filled, teachers
from hybridflow.metrics import read_jsonl
from recipes.quickstart.prepare import Prepared, prepare

CLEARLY = 0.25
"""The least rise of the accuracy that counts as learning; the warm start leaves 23 %, and 256
questions give +-5 %."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    parser.add_argument("--algorithms", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="further settings of every recipe, such as loop.num_steps=5",
    )
    parser.add_argument("--output", type=Path, help="keep the runs' directories here")
    parser.add_argument(
        "--beside",
        type=Path,
        help="a file of --json whose rows of other algorithms stand in table, plot and --json too",
    )
    arguments = parser.parse_args()
    prepared = prepare(Path("outputs/quickstart-data"), console=Console(stderr=True))
    rows = []
    if arguments.beside:
        rows = json.loads(arguments.beside.read_text())
    rows = [row for row in rows if row["algorithm"] not in arguments.algorithms]
    with tempfile.TemporaryDirectory() as temporary:
        models = teachers(arguments.algorithms, Path(temporary))
        for algorithm in arguments.algorithms:
            rows.append(
                train(
                    algorithm,
                    prepared,
                    (arguments.output or Path(temporary)) / algorithm,
                    arguments.set,
                    models,
                )
            )
            print(line(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if arguments.plot:
        draw_curves(rows, arguments.plot)
    flat = [
        row["algorithm"] for row in rows if row["accuracy_after"] - row["accuracy_before"] < CLEARLY
    ]
    if flat:
        raise SystemExit(f"did not learn: {', '.join(flat)}")


def train(
    algorithm: str, prepared: Prepared, output: Path, overrides: list[str], models: dict[str, str]
) -> dict[str, Any]:
    """One run in processes of its own, from its command line to its summary."""
    command = [
        f"recipes.{algorithm}",
        f"model.path={prepared.model_path}",
        f"data.train={prepared.train_path}",
        f"data.validation={prepared.test_path}",
        f"output_dir={output}",
        *COMMON,
        *filled(algorithm, models),
        *overrides,
    ]
    started = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{algorithm} failed:\n{finished.stdout[-6000:]}")
    outcome = json.loads((output / "summary.json").read_text())
    steps = [row for row in read_jsonl(output / "metrics.jsonl") if row["split"] == "validation"]
    return {
        "algorithm": algorithm,
        "accuracy_before": outcome["reward_before"],
        "accuracy_after": outcome["reward_after"],
        "seconds": outcome["train_s"],
        "wall_seconds": time.perf_counter() - started,
        "max_log_prob_gap": outcome["largest"]["actor/log_prob_gap_max"],
        "curve": [[row["step"], row["reward/mean"]] for row in steps],
    }


def line(row: dict[str, Any]) -> str:
    before, after = row["accuracy_before"], row["accuracy_after"]
    return f"{row['algorithm']:<30} {before:7.1%} {after:7.1%} {row['seconds']:8.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'algorithm':<30} {'before':>7} {'after':>7} {'seconds':>8}"
    return "\n".join(["", head, "-" * len(head), *(line(row) for row in rows)])


if __name__ == "__main__":
    main()
