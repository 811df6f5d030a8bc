"""Every algorithm on two ranks and on split pools against one process: the same rewards, losses and
gradient norms, step by step.

python -m benchmarks.algorithm_placements [--json FILE] [--algorithms ppo ...] [--set NAME=VALUE
...]

The real command line, the quickstart's model, task and settings (benchmarks/learning/settings.py)
in small, three steps. What a layout changes is the order in which float32 sums are added up; the
largest relative difference is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.learning.settings import COMMON, SETTINGS
from benchmarks.learning.teachers import filled, teachers
from controllers import ALGORITHMS
from hybridflow.metrics import read_jsonl
from recipes.quickstart.prepare import Prepared, prepare

SMALL = [
    "data.batch_size=8",
    "algorithm.samples_per_prompt=4",
    "loop.num_steps=3",
    "loop.validate_every=0",
]
LOSSES = (
    "actor/policy_loss",
    "actor/distillation_loss",
    "actor/language_loss",
    "actor/preference_loss",
    "critic/value_loss",
)
COMPARED = (
    "reward/mean",
    *LOSSES,
    "actor/grad_norm",
    "actor/entropy",
    "cost/multiplier",
    "kl/coefficient",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--algorithms", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    prepared = prepare(Path("outputs/quickstart-data"), console=Console(stderr=True))
    with tempfile.TemporaryDirectory() as temporary:
        models = teachers(arguments.algorithms, Path(temporary))
        rows = measure(arguments.algorithms, prepared, models, arguments.set)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    algorithms: list[str], prepared: Prepared, models: dict[str, str], overrides: list[str]
) -> list[dict[str, Any]]:
    rows = []
    print(f"{'algorithm':<30} {'placement':<10} {'difference':>10}  largest in")
    for algorithm in algorithms:
        alone = metrics(algorithm, prepared, models, ["runtime=local", "num_devices=1", *overrides])
        for name, settings in placements(algorithm).items():
            difference, where = compare(
                alone, metrics(algorithm, prepared, models, [*settings, *overrides])
            )
            rows.append(
                {
                    "algorithm": algorithm,
                    "placement": name,
                    "difference": difference,
                    "metric": where,
                }
            )
            print(f"{algorithm:<30} {name:<10} {difference:10.1e}  {where}", flush=True)
    return rows


def placements(algorithm: str) -> dict[str, list[str]]:
    """Two ranks of one pool; and the policy with its reference in one pool, all other roles in
    another."""
    roles = ALGORITHMS[algorithm].roles
    policy = [role for role in roles if role in ("actor", "reference")]
    others = [role for role in roles if role not in policy] or ["reward"]
    pools = [f"pools.policy.roles=[{','.join(policy)}]", f"pools.others.roles=[{','.join(others)}]"]
    return {"2 ranks": ["num_devices=2"], "2 pools": ["num_devices=1", "placement=custom", *pools]}


def metrics(
    algorithm: str, prepared: Prepared, models: dict[str, str], settings: list[str]
) -> list[dict[str, Any]]:
    """The metrics that a run logged, step by step."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            f"recipes.{algorithm}",
            f"model.path={prepared.model_path}",
            f"data.train={prepared.train_path}",
            f"output_dir={output}",
            *COMMON,
            *filled(algorithm, models),
            *SMALL,
            *settings,
        ]
        finished = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise RuntimeError(f"{algorithm} {settings} failed:\n{finished.stdout[-6000:]}")
        return [
            row for row in read_jsonl(Path(output) / "metrics.jsonl") if row["split"] == "train"
        ]


def compare(alone: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, str]:
    """(largest difference relative to max(1e-3, the value), step and metric where it is)."""
    largest = (0.0, "")
    for left, right in zip(alone, other, strict=True):
        for name in COMPARED:
            if name in left:
                difference = abs(left[name] - right[name]) / max(1e-3, abs(left[name]))
                largest = max(largest, (difference, f"{name}, step {left['step']}"))
    return largest


if __name__ == "__main__":
    main()
