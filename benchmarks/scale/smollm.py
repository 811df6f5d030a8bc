"""A training step of SmolLM2-135M with and without LoRA: memory and seconds.

python -m benchmarks.scale.smollm DIRECTORY [--json FILE]

DIRECTORY is that of benchmarks.real_model (its --directory). Each side is a process of its own with
engine fsdp in float32, one thread, and takes three steps of supervised fine-tuning on the same rows.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from hybridflow.local_pool import LocalPool
from workers.config import LoraConfig, ModelConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs
from workers.sequences import Sequences

RANKS = (0, 16)
"""0: the whole model is trained."""
NUM_ROWS, ROW_TOKENS, SCORED_TOKENS = 16, 64, 24
NUM_STEPS = 3
KILOBYTE = 1024


def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy over the scored tokens of all rows."""
    assert outputs.log_probs is not None
    return -outputs.log_probs.sum() / (NUM_ROWS * SCORED_TOKENS), {}


def measure(directory: Path) -> Iterator[dict[str, Any]]:
    """A row for each of RANKS."""
    for rank in RANKS:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_side, args=(directory, rank, queue), nprocs=1)
        yield queue.get()


def _side(_: int, directory: Path, rank: int, queue: Any) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(precision=Precision.fp32, lora=LoraConfig(rank=rank))
    lengths = torch.full((NUM_ROWS,), ROW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    rows = Sequences(
        token_ids=torch.randint(1000, 40000, (NUM_ROWS * ROW_TOKENS,), generator=generator),
        lengths=lengths,
        scored_lengths=torch.full((NUM_ROWS,), SCORED_TOKENS),
    )
    with LocalPool() as pool:
        before = _peak_bytes()
        engine = engine_class("fsdp")(
            model=ModelConfig(path=str(directory / "model")),
            config=config,
            head=Head.lm,
            context=pool.context,
        )
        seconds, losses = [], []
        for _ in range(NUM_STEPS):
            started = time.perf_counter()
            losses.append(engine.train_step(rows, loss_fn)["loss"])
            seconds.append(time.perf_counter() - started)
        trained = 0
        for parameter in engine.state(moments=False, copies=True):
            trained += math.prod(parameter.shape)
        queue.put(
            {
                "lora_rank": rank,
                "trained_parameters": trained,
                "step_s": min(seconds[1:]),
                "peak_bytes": _peak_bytes() - before,
                "losses": losses,
            }
        )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.directory):
        rows.append(row)
        print(
            f"rank {row['lora_rank']}: {row['trained_parameters'] / 1e6:.1f} M trained, "
            f"{row['step_s']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
