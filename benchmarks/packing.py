"""Measures what packing rows into one sequence saves over length-bucketed padded blocks: padding,
micro-batches and seconds.

OMP_NUM_THREADS=1 python -m benchmarks.packing [--json FILE] [--repeat N] [--models 3m 30m]    #
some minutes

Seconds are CPU seconds of log-probabilities and of a training step of engine fsdp in this process,
both ways in turn on the same rows, with other lengths every time; the median of N.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import product
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
from workers.engines.shared.rows_together import cut, pack
from workers.sequences import Sequences

STEPS = 100
LOGNORMAL, UNIFORM = "lognormal, median 400, 16 to 4096", "uniform, 32 to 2048"


def sample_lengths(kind: str, rows: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [rows]: demonstrations, or prompts of 8 tokens with responses of 64 or of 8 to 64 as in
    benchmarks.step."""
    if kind == LOGNORMAL:
        return np.clip(generator.lognormal(np.log(400), 0.9, rows), 16, 4096).astype(np.int64)
    if kind == UNIFORM:
        return generator.integers(32, 2049, rows)
    if kind == "8 + 64":
        return np.full(rows, 72)
    return 8 + generator.integers(8, 65, rows)


def count(kind: str, rows: int, budget: int) -> dict[str, float]:
    """Padding of real tokens, and micro-batches of a step, over STEPS steps of `rows` rows."""
    generator = np.random.default_rng(0)
    tokens, in_blocks, in_one_block, num_blocks, num_packed = 0, 0, 0, 0, 0
    for _ in range(STEPS):
        lengths = sample_lengths(kind, rows, generator)
        blocks = cut(lengths, budget)
        tokens += int(lengths.sum())
        in_blocks += sum(len(block) * int(lengths[block].max()) for block in blocks)
        in_one_block += rows * int(lengths.max())
        num_blocks += len(blocks)
        num_packed += len(pack(lengths, budget))
    return {
        "padding": in_blocks / tokens - 1,
        "padding_in_one_block": in_one_block / tokens - 1,
        "micro_batches": num_blocks / STEPS,
        "micro_batches_packed": num_packed / STEPS,
    }


@dataclass(frozen=True)
class Timed:
    """One comparison."""

    model: str
    """Key of benchmarks.step.case.SHAPES."""
    lengths: str
    rows: int
    precision: Precision


WORKLOADS = (
    ("3m", "8 + 64", 256),
    ("3m", "8 + 8 to 64", 256),
    ("3m", LOGNORMAL, 32),
    ("30m", "8 + 64", 64),
    ("30m", "8 + 8 to 64", 64),
    ("30m", LOGNORMAL, 16),
)
"""(model, lengths, rows) of the comparisons, each in bf16 and in fp32."""
TIMED = [
    Timed(*workload, precision)
    for workload, precision in product(WORKLOADS, (Precision.bf16, Precision.fp32))
]


def seconds(case: Timed, repeat: int) -> dict[str, float]:
    """Medians of a forward pass and of a training step, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        shape = ModelShape(**SHAPES[case.model], max_tokens=4096)  # type: ignore[arg-type]
        make_model(tokenizer, shape, seed=0).save_pretrained(folder)
        engines = {}
        for way, packing in (("blocks", False), ("packed", True)):
            engines[way] = FsdpEngine(
                model=ModelConfig(path=folder),
                config=TrainConfig(precision=case.precision, packing=packing),
                head=Head.lm,
                context=RankContext(),
            )
    times: dict[str, list[float]] = defaultdict(list)
    generator = np.random.default_rng(1)
    for turn in range(repeat + 1):
        rows = random_rows(
            sample_lengths(case.lengths, case.rows, generator), len(tokenizer), generator
        )
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
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {**medians, "train_packed_to_blocks": float(np.median(ratios))}


def random_rows(lengths: np.ndarray, vocabulary: int, generator: np.random.Generator) -> Sequences:
    """Random rows of the given lengths; everything after the first 8 tokens of a row is scored."""
    sizes = torch.from_numpy(lengths)
    return Sequences(
        token_ids=torch.from_numpy(generator.integers(0, vocabulary, int(lengths.sum()))),
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
    counted = []
    for kind, rows, budget in product((LOGNORMAL, UNIFORM), (64, 128, 512), (8192, 16384)):
        row = count(kind, rows, budget)
        counted.append({"lengths": kind, "rows": rows, "budget_tokens": budget, **row})
        print(
            f"{kind:<36} {rows:>4} rows, {budget:>6} tokens: padding {row['padding']:.1%}, "
            f"as one block {row['padding_in_one_block']:.0%}; "
            f"{row['micro_batches']:.1f} micro-batches, packed {row['micro_batches_packed']:.1f}"
        )
    transformers_logging.disable_progress_bar()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    timed = []
    for case in TIMED:
        if case.model not in arguments.models:
            continue
        result = seconds(case, arguments.repeat)
        timed.append({**asdict(case), **result})
        print(
            f"{case.model:<4} {case.precision.value} {case.lengths:<36} {case.rows:>4} rows: "
            f"forward {result['forward_blocks_s']:.3f} s in blocks, "
            f"{result['forward_packed_s']:.3f} packed; training {result['train_blocks_s']:.3f} "
            f"and {result['train_packed_s']:.3f}, packed / blocks "
            f"{result['train_packed_to_blocks']:.3f}",
            flush=True,
        )
    dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps({"counted": counted, "timed": timed}, indent=1))


if __name__ == "__main__":
    main()
