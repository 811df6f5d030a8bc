"""What packing rows into one sequence saves over length-bucketed padded blocks: padding, micro-batches and
seconds.

OMP_NUM_THREADS=1 python -m benchmarks.packing [--json FILE] [--repeat N] [--models 3m 30m]    # some minutes

Seconds are CPU seconds of log-probabilities and of a training step of engine fsdp in this process, both ways
in turn on the same rows, with other lengths every time; the median of N.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import logging as transformers_logging

from benchmarks.step.case import SHAPES
from hybridflow.context import RankContext
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines.base import Head, Outputs
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.shared.micro_batches import cut, pack
from workers.sequences import Sequences

STEPS = 100
LOGNORMAL, UNIFORM = "lognormal, median 400, 16 to 4096", "uniform, 32 to 2048"


def drawn_lengths(kind: str, rows: int, drawn: np.random.Generator) -> np.ndarray:
    """int64 [rows]: demonstrations, or prompts of 8 tokens with responses of 64 or of 8 to 64 as in
    benchmarks.step."""
    if kind == LOGNORMAL:
        return np.clip(drawn.lognormal(np.log(400), 0.9, rows), 16, 4096).astype(np.int64)
    if kind == UNIFORM:
        return drawn.integers(32, 2049, rows)
    return np.full(rows, 72) if kind == "8 + 64" else 8 + drawn.integers(8, 65, rows)


def count(kind: str, rows: int, budget: int) -> dict[str, float]:
    """Padding of real tokens, and micro-batches of a step, over STEPS steps of `rows` rows."""
    drawn = np.random.default_rng(0)
    steps = [drawn_lengths(kind, rows, drawn) for _ in range(STEPS)]
    tokens = sum(int(step.sum()) for step in steps)
    blocks = [(step, cut(step, budget)) for step in steps]
    computed = sum(len(block) * int(step[block].max()) for step, found in blocks for block in found)
    return {
        "padding": computed / tokens - 1,
        "padding_in_one_block": sum(rows * int(step.max()) for step in steps) / tokens - 1,
        "micro_batches": sum(len(found) for _, found in blocks) / STEPS,
        "micro_batches_packed": sum(len(pack(step, budget)) for step in steps) / STEPS,
    }


@dataclass(frozen=True)
class Timed:
    """One comparison."""

    model: str
    """Key of benchmarks.step.case.SHAPES."""
    lengths: str
    rows: int
    precision: Precision


TIMED = [
    Timed(model, lengths, rows, precision)
    for model, lengths, rows in (
        ("3m", "8 + 64", 256),
        ("3m", "8 + 8 to 64", 256),
        ("3m", LOGNORMAL, 32),
        ("30m", "8 + 64", 64),
        ("30m", "8 + 8 to 64", 64),
        ("30m", LOGNORMAL, 16),
    )
    for precision in (Precision.bf16, Precision.fp32)
]


def seconds(case: Timed, repeat: int) -> dict[str, float]:
    """Medians of a forward pass and of a training step, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        make_model(tokenizer, ModelShape(**SHAPES[case.model], max_tokens=4096), seed=0).save_pretrained(
            folder
        )  # type: ignore[arg-type]
        model = ModelConfig(path=folder)
        engines = {
            way: FsdpEngine(
                model=model,
                config=TrainConfig(precision=case.precision, packing=packing),
                head=Head.lm,
                context=RankContext(),
            )
            for way, packing in (("blocks", False), ("packed", True))
        }
    times: dict[str, list[float]] = {
        f"{kind}_{way}_s": [] for way in engines for kind in ("forward", "train")
    }
    drawn = np.random.default_rng(1)
    for turn in range(repeat + 1):
        rows = random_rows(drawn_lengths(case.lengths, case.rows, drawn), len(tokenizer), drawn)
        for way in sorted(engines, reverse=bool(turn % 2)):
            begin = time.process_time()
            engines[way].forward(rows)
            middle = time.process_time()
            engines[way].train_step(rows, likelihood)
            end = time.process_time()
            if turn:  # the first one warms up
                times[f"forward_{way}_s"].append(middle - begin)
                times[f"train_{way}_s"].append(end - middle)
    ratios = np.array(times["train_packed_s"]) / np.array(times["train_blocks_s"])
    return {name: float(np.median(found)) for name, found in times.items()} | {
        "train_packed_to_blocks": float(np.median(ratios))
    }


def random_rows(lengths: np.ndarray, vocabulary: int, drawn: np.random.Generator) -> Sequences:
    """Everything behind the first 8 tokens of a row is scored."""
    sizes = torch.from_numpy(lengths)
    return Sequences(
        token_ids=torch.from_numpy(drawn.integers(0, vocabulary, int(lengths.sum()))),
        lengths=sizes,
        scored_lengths=sizes - 8,
    )


def likelihood(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood, over roughly the tokens of a step."""
    assert outputs.log_probs is not None
    return -outputs.log_probs.sum() / 10_000, {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    counted = [
        {"lengths": kind, "rows": rows, "budget_tokens": budget, **count(kind, rows, budget)}
        for kind in (LOGNORMAL, UNIFORM)
        for rows in (64, 128, 512)
        for budget in (8192, 16384)
    ]
    for row in counted:
        print(
            f"{row['lengths']:<36} {row['rows']:>4} rows, {row['budget_tokens']:>6} tokens: padding "
            f"{row['padding']:.1%}, as one block "
            f"{row['padding_in_one_block']:.0%}; {row['micro_batches']:.1f} micro-batches, packed "
            f"{row['micro_batches_packed']:.1f}"
        )
    transformers_logging.disable_progress_bar()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    timed = []
    for case in (one for one in TIMED if one.model in arguments.models):
        found = seconds(case, arguments.repeat)
        timed.append(
            {
                "model": case.model,
                "lengths": case.lengths,
                "rows": case.rows,
                "precision": case.precision.value,
                **found,
            }
        )
        print(
            f"{case.model:<4} {case.precision.value} {case.lengths:<36} {case.rows:>4} rows: "
            f"forward {found['forward_blocks_s']:.3f} s in blocks, {found['forward_packed_s']:.3f} packed; "
            f"training {found['train_blocks_s']:.3f} and {found['train_packed_s']:.3f}, "
            f"packed / blocks {found['train_packed_to_blocks']:.3f}",
            flush=True,
        )
    dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps({"counted": counted, "timed": timed}, indent=1))


if __name__ == "__main__":
    main()
