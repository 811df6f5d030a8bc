"""One step, cut in every way: engines x layouts x micro-batches x placements through the real command line,
against plain float64.

python -m benchmarks.invariance --json FILE [--algorithms ppo grpo gspo safe_rlhf]

Every row is a run of its own, `python -m recipes.ppo ...` with its settings on the command line: two
optimizer steps on the same samples (sampling is seeded per prompt, and the benchmark checks that the samples
are the same). The reference (benchmarks/invariance/reference.py) gets the samples and the rewards and nothing
else. Errors are relative: of the loss, of the gradient norm, and |change - reference change| / |reference
change| over all parameters; the largest one of actor and critics. Float32 rounding of other summation orders
is what is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.invariance import case
from benchmarks.invariance.reference import Numbers, Rows, reference_step
from workers.engines.shared.checkpoint import load_tensors

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("ppo", "grpo", "gspo", "safe_rlhf")
TOLERANCE = 1e-4
"""Of every relative error."""
SMALL, LARGE = 48, 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """How one step is cut."""

    algorithm: str
    engine: str = "fsdp"
    layout: str = "1 rank"
    train: tuple[str, ...] = ()
    """Settings of every model's `train` that make the layout."""
    num_devices: int = 1
    micro_batch_tokens: int = LARGE
    placement: str = "local"
    """local (one process), colocated (one pool) or split (actor and reference apart from the rest)."""

    def settings(self) -> list[str]:
        roles = ("reference", *case.TRAINED[self.algorithm])
        chosen = (f"engine={self.engine}", f"micro_batch_tokens={self.micro_batch_tokens}", *self.train)
        own = [f"{role}.train.{setting}" for role in roles for setting in chosen]
        if self.placement == "local":
            return [*own, "runtime=local"]
        if self.placement == "colocated":
            return [*own, f"num_devices={self.num_devices}"]
        others = [*case.TRAINED[self.algorithm][1:], "reward"]
        return [
            *own,
            "placement=custom",
            f"pools.policy.num_devices={self.num_devices}",
            "pools.policy.roles=[actor,reference]",
            "pools.rest.num_devices=1",
            f"pools.rest.roles=[{','.join(others)}]",
        ]


def combinations(algorithm: str) -> list[Combination]:
    """In one process: engines and micro-batches. On two and four ranks: layouts and placements."""

    def make(
        engine: str, layout: str, tokens: int, *train: str, ranks: int = 1, placement: str = ""
    ) -> Combination:
        place = placement or ("local" if ranks == 1 else "colocated")
        return Combination(
            algorithm=algorithm,
            engine=engine,
            layout=layout,
            train=train,
            num_devices=ranks,
            micro_batch_tokens=tokens,
            placement=place,
        )

    zero1, zero2, zero3 = (f"zero_stage={stage}" for stage in (1, 2, 3))
    grid = {
        "ppo": [
            make("fsdp", "1 rank", LARGE),
            make("fsdp", "1 rank", SMALL),
            make("fsdp", "1 rank, blocks", SMALL, "packing=false"),
            make("threed", "1 rank", SMALL),
            make("deepspeed", "zero1, 1 rank", LARGE, zero1),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("fsdp", "dp2", SMALL, ranks=2),
            make("fsdp", "dp2, resharded", LARGE, "reshard_after_forward=true", ranks=2),
            make("fsdp", "tp2", LARGE, "tp=2", ranks=2),
            make("threed", "pp2", SMALL, "pp=2", ranks=2),
            make("threed", "pp2, blocks", SMALL, "pp=2", "packing=false", ranks=2),
            make("threed", "pp2 tp2", LARGE, "pp=2", "tp=2", ranks=4),
            make("deepspeed", "zero2, dp2", LARGE, zero2, ranks=2),
            make("deepspeed", "zero3, dp2", SMALL, zero3, ranks=2),
            make("fsdp", "dp2", LARGE, ranks=2, placement="split"),
        ],
        "grpo": [
            make("fsdp", "1 rank", SMALL),
            make("threed", "1 rank", LARGE),
            make("deepspeed", "zero2, 1 rank", SMALL, zero2),
            make("fsdp", "dp2", LARGE, ranks=2),
            make("threed", "tp2", SMALL, "tp=2", ranks=2),
            make("deepspeed", "zero3, dp2", LARGE, zero3, ranks=2),
        ],
        "gspo": [
            make("fsdp", "1 rank", LARGE),
            make("threed", "1 rank", SMALL),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("threed", "pp2", LARGE, "pp=2", ranks=2),
            make("deepspeed", "zero1, dp2", SMALL, zero1, ranks=2),
        ],
        "safe_rlhf": [
            make("fsdp", "1 rank", SMALL),
            make("threed", "1 rank", LARGE),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("fsdp", "dp2", SMALL, ranks=2),
            make("deepspeed", "zero2, dp2", LARGE, zero2, ranks=2),
        ],
    }
    return grid[algorithm]


def run(combination: Combination, directory: Path, output: Path) -> tuple[dict[str, Numbers], Rows]:
    """What the command line's run logged and saved, and what its reward function saw."""
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


def numbers(algorithm: str, directory: Path, output: Path) -> dict[str, Numbers]:
    """Metrics and changes of a finished run."""
    logged: dict[str, Any] = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    return {
        role: Numbers(
            loss=logged[f"{role}/loss"],
            grad_norm=logged[f"{role}/grad_norm"],
            change=change(directory / case.STARTS[role], checkpoint / role),
        )
        for role in case.TRAINED[algorithm]
    }


def change(start: Path, checkpoint: Path) -> dict[str, Tensor]:
    """What the run did to every parameter, from the files of its distributed checkpoint."""
    from safetensors.torch import load_file

    before = load_file(start / "model.safetensors")
    after = {f"model.{name}": torch.empty_like(value) for name, value in before.items()}
    load_tensors(after, checkpoint)
    return {name: after[f"model.{name}"].double() - value.double() for name, value in before.items()}


def rollouts(output: Path) -> Rows:
    """In an order that does not depend on who drew which row."""
    rows: Rows = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["number"], row["response"]))


def errors(found: dict[str, Numbers], wanted: dict[str, Numbers]) -> dict[str, float]:
    """The row's three numbers."""
    pairs = [(found[role], wanted[role]) for role in wanted]
    return {
        "loss_error": max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs),
        "grad_norm_error": max(abs(a.grad_norm - b.grad_norm) / abs(b.grad_norm) for a, b in pairs),
        "update_error": max(distance(a.change, b.change) for a, b in pairs),
    }


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of two updates, relative to the second."""
    if found.keys() != wanted.keys():
        raise ValueError(f"the two models have different parameters: {sorted(found.keys() ^ wanted.keys())}")
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return float((difference / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5)


def compare(chosen: list[Combination], directory: Path) -> list[dict[str, Any]]:
    """A row for every combination; the samples of the first one of each algorithm are the reference's."""
    samples: dict[str, Rows] = {}
    wanted: dict[str, dict[str, Numbers]] = {}
    rows = []
    for number, combination in enumerate(chosen):
        started = time.perf_counter()
        found, drawn = run(combination, directory, directory / f"run{number}")
        algorithm = combination.algorithm
        if algorithm not in samples:
            samples[algorithm], wanted[algorithm] = drawn, reference_step(algorithm, directory, drawn)
        if drawn != samples[algorithm]:
            raise RuntimeError(f"{combination}: other samples than the algorithm's first combination")
        row = {
            "algorithm": algorithm,
            "engine": combination.engine,
            "layout": combination.layout,
            "micro_batch_tokens": combination.micro_batch_tokens,
            "placement": combination.placement,
            **errors(found, wanted[algorithm]),
        }
        rows.append(row)
        show(row, time.perf_counter() - started)
    return rows


def show(row: dict[str, Any], seconds: float) -> None:
    where = f"{row['algorithm']:<10} {row['engine']:<10} {row['layout']:<15} {row['micro_batch_tokens']:>5} {row['placement']:<10}"
    print(
        f"{where} loss {row['loss_error']:.1e}  norm {row['grad_norm_error']:.1e}  update "
        f"{row['update_error']:.1e}  {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="one step, cut in every way, against a plain float64 step")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        case.make_case(directory)
        rows = compare(
            [combination for name in arguments.algorithms for combination in combinations(name)], directory
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    worst = max(max(row["loss_error"], row["grad_norm_error"], row["update_error"]) for row in rows)
    print(f"{len(rows)} combinations, largest error {worst:.1e} (tolerance {TOLERANCE:.0e})")
    if worst > TOLERANCE:
        raise SystemExit("a combination differs from the reference by more than the tolerance")


if __name__ == "__main__":
    main()
