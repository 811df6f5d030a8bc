"""Engine `threed` on every layout of up to 8 ranks against plain PyTorch in one process: 3 training
steps, same data, same weights.

python -m benchmarks.threed_equivalence --json FILE [--ranks 8] [--model llama]

A row per (pipeline, tensor, data) size that fits the model, 1F1B and, where the layers suffice,
interleaved 1F1B, in the paper's rank order and in Megatron's: the largest difference of the losses,
of the gradient norms (both relative) and of any element of any weight after the last step
(absolute; the learning rate is 1e-3). The plain run has no padding, no micro-batches and full
logits. Gloo, one thread a rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoConfig

from tests.engines.threed_cases import FAMILIES, PlainRun, load_plain, plain_run, save_tiny_model
from tests.engines.threed_workers import OPTIMIZER, Case, Result, batches, run_worlds
from workers.engines.threed.layout import fitting_layouts

LAYERS, HEADS = 8, 8
TOLERANCE = 1e-5
"""The largest difference that float32 rounding of other summation orders makes, through three
AdamW steps (epsilon 1e-4)."""
ORDERS = ("dp pp cp tp", "pp dp cp tp")


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_tiny_model(
            root / arguments.model,
            arguments.model,
            heads=HEADS,
            kv_heads=HEADS,
            layers=LAYERS,
            tied=True,
        )
        cases = layouts(root / arguments.model, arguments.model, arguments.ranks)
        expected = plain_run(
            load_plain(root / arguments.model, cases[0].head),
            cases[0].head,
            batches(cases[0]),
            OPTIMIZER,
        )
        rows = []
        for world_size in range(1, arguments.ranks + 1):
            rows += run_all(
                [case for case in cases if case.world_size == world_size],
                world_size,
                root,
                expected,
            )
    worst = max(max(row["loss"], row["grad_norm"], row["weight"]) for row in rows)
    print(f"{len(rows)} layouts, largest difference {worst:.1e} (tolerance {TOLERANCE:.0e})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if worst > TOLERANCE:
        raise SystemExit("a layout differs from the plain run by more than the tolerance")


def layouts(directory: Path, name: str, most_ranks: int) -> list[Case]:
    """Every layout of at most `most_ranks` ranks that fits, with each schedule and rank order
    that makes a difference."""
    config = AutoConfig.from_pretrained(directory)
    cases: dict[str, Case] = {}
    for world_size, virtual, order in product(range(1, most_ranks + 1), (1, 2), ORDERS):
        for pipeline, tensor, data in fitting_layouts(config, world_size, virtual):
            if (virtual > 1 and pipeline == 1) or (
                order != ORDERS[0] and (pipeline == 1 or data == 1)
            ):
                continue
            case = Case(
                p=pipeline, t=tensor, d=data, virtual=virtual, order=order, model=name, num_rows=10
            )
            cases[case.name] = case
    return list(cases.values())


def run_all(
    cases: list[Case], world_size: int, root: Path, expected: PlainRun
) -> list[dict[str, Any]]:
    """The rows of all cases of one world size, run in one set of processes."""
    start = time.perf_counter()
    mp.spawn(
        run_worlds, (root, [(world_size, [("train", case) for case in cases])]), nprocs=world_size
    )
    rows = [compare(case, root, expected) for case in cases]
    for row in rows:
        layout = f"{row['p']}-{row['t']}-{row['d']}  {row['schedule']:<17} {row['order']:<12}"
        print(
            f"{layout} loss {row['loss']:.1e}  norm {row['grad_norm']:.1e}  weight "
            f"{row['weight']:.1e}"
        )
    print(
        f"{world_size} ranks: {len(rows)} layouts in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return rows


def compare(case: Case, root: Path, expected: PlainRun) -> dict[str, Any]:
    result: Result = torch.load(root / case.name / "result0.pt", weights_only=False)
    weights = load_plain(root / case.name, case.head).state_dict()
    return {
        "p": case.p,
        "t": case.t,
        "d": case.d,
        "schedule": "1f1b" if case.virtual == 1 else "interleaved_1f1b",
        "order": case.order,
        "loss": _relative([step["loss"] for step in result.metrics], expected.losses),
        "grad_norm": _relative([step["grad_norm"] for step in result.metrics], expected.grad_norms),
        "weight": max(
            float((weights[name] - value).abs().max())
            for name, value in expected.parameters.items()
        ),
    }


def _relative(actual: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="engine threed against plain PyTorch on every small layout"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=8, help="largest number of processes")
    parser.add_argument("--model", choices=FAMILIES, default="llama")
    return parser.parse_args()


if __name__ == "__main__":
    main()
