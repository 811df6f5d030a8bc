"""Steps with responses drawn ahead against synchronous ones: seconds, staleness, idle pools, reward.

python -m benchmarks.asynchronous --json FILE [--only virtual]

virtual: in virtual time for 32 + 32 devices (virtual.py); real: on two CPU processes with real
models (real.py); reward: what a tiny task's reward becomes at equal samples, over seeds (learning.py).
The parts can be run one by one: --only, --models, --cases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.asynchronous import learning, real, virtual

COLUMNS = (
    "step_s",
    "speed",
    "staleness_mean",
    "staleness_max",
    "bound",
    "idle_generator",
    "idle_trainer",
    "reward_before",
    "reward",
    "reward_spread",
)
CASES = [(0, ""), (1, "recompute"), (1, "keep"), (1, "drain"), (2, "recompute"), (2, "keep")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.asynchronous",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", choices=("virtual", "real", "reward"))
    parser.add_argument("--models", nargs="+", choices=sorted(real.MODELS), default=["tiny", "3m"])
    parser.add_argument(
        "--steps", type=int, default=20, help="of a real run (default: %(default)s)"
    )
    parser.add_argument(
        "--mean-tokens",
        type=int,
        default=0,
        help="of a real run's responses (default: the model's)",
    )
    parser.add_argument(
        "--correction",
        choices=sorted(real.CORRECTIONS),
        default="rollout",
        help="of a real run with staleness (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="of reward (default: %(default)s)")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=int,
        default=list(range(len(CASES))),
        help=f"numbers of (staleness, in_flight): {dict(enumerate(CASES))}",
    )
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    synchronous: dict[str, float] = {}

    def add(row: dict[str, Any]) -> None:
        if "step_s" in row:
            if not row["staleness"]:
                synchronous[row["where"]] = row["step_s"]
            if row["where"] in synchronous:
                row["speed"] = synchronous[row["where"]] / row["step_s"]
        rows.append(row)
        show(row)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")

    if arguments.only in (None, "virtual"):
        for row in virtual.table():
            add(row)
    cases = [CASES[number] for number in arguments.cases]
    with tempfile.TemporaryDirectory() as directory:
        if arguments.only in (None, "real"):
            for model in arguments.models:
                for number, (staleness, mode) in enumerate(cases):
                    where = Path(directory) / model / str(number)
                    steps, mean_tokens = arguments.steps, arguments.mean_tokens
                    correction = arguments.correction
                    add(real.measure(where, model, staleness, mode, steps, mean_tokens, correction))
        if arguments.only in (None, "reward"):
            for number, (staleness, mode) in enumerate(cases):
                where = Path(directory) / "reward" / str(number)
                add(learning.measure(where, staleness, mode, arguments.seeds, learning.NUM_STEPS))


def show(row: dict[str, Any]) -> None:
    numbers = " ".join(f"{name} {row[name]:.3g}" for name in COLUMNS if name in row)
    name = f"{row['mode']:<12} staleness {row['staleness']} look-ahead {row['look_ahead']}"
    print(f"{row['where']:<26} {name}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
