"""One step, cut in every way: engines x layouts x micro-batches x placements through the real
command line, against plain float64.

python -m benchmarks.invariance --json FILE [--algorithms ppo grpo gspo safe_rlhf]

Every row is a run of its own, `python -m recipes.ppo ...` with its settings on the command line:
two optimizer steps on the same samples (sampling is seeded per prompt, and the benchmark checks
that the samples are the same). The reference (benchmarks/invariance/reference.py) gets the samples
and the rewards and nothing else. Errors are relative: of the loss, of the gradient norm, and
|change - reference change| / |reference change| over all parameters; the largest one of actor and
critics. Float32 rounding of other summation orders is what is left.
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

from benchmarks.invariance import case
from benchmarks.invariance.combinations import ALGORITHMS, Combination, combinations
from benchmarks.invariance.outcome import errors, numbers, rollouts
from benchmarks.invariance.reference import Numbers, Rows, reference_step

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""The largest relative error that is allowed."""


def run(combination: Combination, directory: Path, output: Path) -> tuple[dict[str, Numbers], Rows]:
    """Runs the recipe; returns the numbers that it logged and saved, and the rows that its
    reward function saw."""
    output.mkdir(parents=True)
    arguments = case.settings(combination.algorithm, directory, output) + combination.settings()
    command = [sys.executable, "-m", f"recipes.{combination.algorithm}", *arguments]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        env=case.environment(),
    )
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stdout[-4000:]}")
    return numbers(combination.algorithm, directory, output), rollouts(output)


def compare(chosen: list[Combination], directory: Path) -> list[dict[str, Any]]:
    """A row for every combination; the samples of the first one of each algorithm are the
    reference's."""
    samples: dict[str, Rows] = {}
    expected: dict[str, dict[str, Numbers]] = {}
    rows = []
    for number, combination in enumerate(chosen):
        started = time.perf_counter()
        actual, sampled = run(combination, directory, directory / f"run{number}")
        algorithm = combination.algorithm
        if algorithm not in samples:
            samples[algorithm] = sampled
            expected[algorithm] = reference_step(algorithm, directory, sampled)
        if sampled != samples[algorithm]:
            raise RuntimeError(
                f"{combination}: other samples than the algorithm's first combination"
            )
        row = {
            "algorithm": algorithm,
            "engine": combination.engine,
            "layout": combination.layout,
            "micro_batch_tokens": combination.micro_batch_tokens,
            "placement": combination.placement,
            **errors(actual, expected[algorithm]),
        }
        rows.append(row)
        show(row, time.perf_counter() - started)
    return rows


def show(row: dict[str, Any], seconds: float) -> None:
    cut = (
        f"{row['algorithm']:<10} {row['engine']:<10} {row['layout']:<15} "
        f"{row['micro_batch_tokens']:>5}"
    )
    loss, norm, update = row["loss_error"], row["grad_norm_error"], row["update_error"]
    print(
        (
            f"{cut} {row['placement']:<10} loss {loss:.1e}  norm {norm:.1e}  update {update:.1e}  "
            f"{seconds:.0f} s"
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.invariance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        case.make_case(directory)
        chosen: list[Combination] = []
        for name in arguments.algorithms:
            chosen += combinations(name)
        rows = compare(chosen, directory)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    worst = max(max(row["loss_error"], row["grad_norm_error"], row["update_error"]) for row in rows)
    print(f"{len(rows)} combinations, largest error {worst:.1e} (tolerance {TOLERANCE:.0e})")
    if worst > TOLERANCE:
        raise SystemExit("a combination differs from the reference by more than the tolerance")


if __name__ == "__main__":
    main()
