"""Measures what snapshots cost a step, and how long restoring takes from memory and from disk.

python -m benchmarks.checkpoint [--json FILE] [--models 3m 30m] [--every 1 10 0] [--steps N]

GRPO of the models of benchmarks.step in this process (runtime=local, engine hf, one device). The
same steps are run for each interval of --every (default: a snapshot after every step; 0: none), on
one thread. A stall is the CPU seconds of the snapshots, for which the loop stands still, over those of
steps and snapshots; the first step and the two snapshots that take the memory are left out. CPU
seconds, because other work on the machine does not change them. Restoring is Loop.restore(), from
the last snapshot in memory and from the checkpoint.

A row: {"model": "3m", "every": 1, "stall_fraction": 0.004, "restore_s": 0.05, "source": "memory"}
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import logging as transformers_logging

from benchmarks.step.case import SHAPES
from controllers.loop import Loop
from hybridflow import Session, open_session
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer

MODELS = ("3m", "30m")
EVERY = (1,)
Row = dict[str, str | int | float]


@contextmanager
def session(model: Path, output: Path, num_steps: int, every: int) -> Iterator[Session]:
    """A run on 64 prompts of numbers; `every`: as recovery.snapshot_every."""
    data = output.parent / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"{number} + {number} =", "answer": "0"}) for number in range(64)
    ]
    data.write_text("\n".join(lines) + "\n")
    settings = {
        "runtime": "local",
        "device": "cpu",
        "threads_per_device": 1,
        "model.path": model,
        "data.train": data,
        "data.batch_size": 32,
        "algorithm.samples_per_prompt": 8,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 64,
        "actor.train.precision": "fp32",
        "metrics.console": False,
        "metrics.tensorboard": False,
        "loop.num_steps": num_steps,
        "loop.validate_every": 0,
        "recovery.snapshot_every": every,
        "output_dir": output,
    }
    with open_session("grpo", settings, reward=length_reward) as opened:
        yield opened


def length_reward(*, response: str, **columns: object) -> float:
    return float(len(response) % 5)


def stall_fraction(loop: Loop, num_steps: int, every: int) -> float:
    """See above; 0 without snapshots."""
    steps, snapshots = 0.0, 0.0
    for number in range(num_steps + 1):
        started = time.process_time()
        loop.train_one_step()
        trained = time.process_time()
        if number == 0 and every:
            for _ in range(2):  # the two buffers
                loop.snapshot()
        elif every and loop.step % every == 0:
            loop.snapshot()
        ended = time.process_time()
        if number:
            steps += trained - started
            snapshots += ended - trained
    return snapshots / (steps + snapshots)


def restore_seconds(loop: Loop, source: str) -> float:
    """The median of three restores, of the newest snapshot or of a checkpoint."""
    if source == "disk":
        loop.checkpoint()
        loop.saving.clear()
        loop.saving.memory = None
    seconds = []
    for _ in range(3):
        started = time.process_time()
        loop.restore()
        seconds.append(time.process_time() - started)
    return sorted(seconds)[1]


def measure(model: str, intervals: Sequence[int], num_steps: int, root: Path) -> list[Row]:
    transformers_logging.disable_progress_bar()
    directory = root / model
    tokenizer = make_tokenizer()
    shape = ModelShape(**SHAPES[model], max_tokens=128)  # type: ignore[arg-type]
    make_model(tokenizer, shape, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    rows: list[Row] = []
    for every in intervals:
        output = root / f"{model}-{every}"
        with session(directory, output, num_steps, every) as opened:
            loop = opened.loop
            fraction = stall_fraction(loop, max(num_steps, every), every)
            for source in ("memory", "disk") if every else ("disk",):
                rows.append(
                    {
                        "model": model,
                        "every": every,
                        "stall_fraction": round(fraction, 5),
                        "restore_s": round(restore_seconds(loop, source), 4),
                        "source": source,
                    }
                )
                print(rows[-1], flush=True)
            loop.saving.clear()
        shutil.rmtree(output)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--every", nargs="+", type=int, default=list(EVERY))
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as root:
        for model in options.models:
            rows += measure(model, options.every, options.steps, Path(root))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
