"""LoRA, long context, mixtures of experts and images against the plain run.

python -m benchmarks.scale --features lora cp experts images [--json FILE]

Each feature gives rows of one form (benchmarks/scale/row.py): errors against a run of one process,
the bytes that move beside the fewest possible, memory and seconds. The command fails where an error
is above the rounding of float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.scale import context_parallel, experts, images, lora
from benchmarks.scale.row import Row

FEATURES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "lora": lora.measure,
    "cp": context_parallel.measure,
    "experts": experts.measure,
    "images": images.measure,
}
"""name -> rows, measured with files in a temporary directory."""
LARGEST_RATIO = 1.2
"""Of the seconds with a feature that is to cost next to nothing to those without."""
TOLERANCE = 1e-5
"""The largest error that rounding makes, in all four columns of errors."""
COLUMNS = (
    "feature",
    "family",
    "layout",
    "loss_error",
    "grad_norm_error",
    "update_error",
    "log_prob_gap",
    "sync_bytes",
    "bound_bytes",
    "peak_bytes",
    "step_s",
    "time_ratio",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(" | ".join(COLUMNS))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.features:
            for row in FEATURES[name](Path(directory)):
                rows.append(row)
                print(_line(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    slowest = max(row.time_ratio or 0.0 for row in rows)
    if slowest > LARGEST_RATIO:
        raise SystemExit(f"a feature takes {slowest:.2f} times the seconds, above {LARGEST_RATIO}")
    worst = max(map(_error, rows))
    if worst > TOLERANCE:
        raise SystemExit(f"the largest error is {worst:.1e}, above the tolerance {TOLERANCE:.0e}")


def _line(row: Row) -> str:
    cells = []
    for value in asdict(row).values():
        cells.append(f"{value:.2g}" if isinstance(value, float) else str(value))
    return " | ".join(cells)


def _error(row: Row) -> float:
    return max(row.loss_error, row.grad_norm_error, row.update_error, row.log_prob_gap)


if __name__ == "__main__":
    main()
