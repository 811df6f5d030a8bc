"""How much padding length-bucketed micro-batches leave, which is what packing rows into one sequence could save.

python -m benchmarks.packing [--json FILE]    # seconds; counts tokens, starts nothing
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from workers.engines.micro_batches import cut

STEPS = 100


def drawn_lengths() -> dict[str, np.ndarray]:
    """Tokens of demonstrations, [rows] of each distribution."""
    drawn = np.random.default_rng(0)
    lognormal = np.clip(drawn.lognormal(np.log(400), 0.9, 100_000), 16, 4096).astype(np.int64)
    return {"lognormal, median 400, 16 to 4096": lognormal, "uniform, 32 to 2048": drawn.integers(32, 2049, 100_000)}


def measure(lengths: np.ndarray, rows: int, budget: int) -> dict[str, float]:
    """Fractions of the real tokens, and micro-batches of a step, over STEPS steps of `rows` rows."""
    steps = [lengths[start : start + rows] for start in range(0, STEPS * rows, rows)]
    steps = [step for step in steps if len(step) == rows]
    tokens = sum(int(step.sum()) for step in steps)
    blocks = [(step, cut(step, budget)) for step in steps]
    computed = sum(len(block) * int(step[block].max()) for step, found in blocks for block in found)
    return {
        "padding": computed / tokens - 1,
        "padding_in_one_block": sum(rows * int(step.max()) for step in steps) / tokens - 1,
        "micro_batches": sum(len(found) for _, found in blocks) / len(steps),
        "micro_batches_if_packed": tokens / budget / len(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results = [
        {"lengths": name, "rows": rows, "budget_tokens": budget, **measure(lengths, rows, budget)}
        for name, lengths in drawn_lengths().items()
        for rows in (64, 128, 512)
        for budget in (8192, 16384)
    ]
    for row in results:
        print(
            f"{row['lengths']:<36} {row['rows']:>4} rows, {row['budget_tokens']:>6} tokens: padding {row['padding']:.1%}, as one block "
            f"{row['padding_in_one_block']:.0%}; {row['micro_batches']:.1f} micro-batches, packed {row['micro_batches_if_packed']:.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
