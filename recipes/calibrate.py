"""Measure the machine at hand for a minute or two and fit the mapper's constants to it.

    python -m recipes.calibrate output=calibration       # writes calibration.json, cluster.json and what was measured
    python -m recipes.plan ... calibration=calibration/calibration.json cluster=calibration/cluster.json

Runs the real engines on small random models, in as many processes at once as a pool of this machine has, so
that what they take from each other is in the numbers; fits what it measured
(hybridflow/mapping/calibrate/fit.py); and ends with a few steps of recipes.ppo, on one rank and on all, for
what only a whole step shows (recipes/calibration_run.py). Links between machines are not measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from hybridflow.mapping.answer.explain import table
from hybridflow.mapping.calibrate.compare import save_runs
from hybridflow.mapping.calibrate.fit import Fit, fit, refine
from hybridflow.mapping.calibrate.measurements import Measurements
from hybridflow.mapping.question.cluster import Cluster, NodeGroup
from hybridflow.pool import KEEP_FREED_MEMORY
from recipes.calibration_rank import Rank
from recipes.calibration_run import run_steps
from recipes.mapping_settings import engine_space
from workers.config import Precision

SIZES = {"3M": (4, 192, 512, 4096), "11M": (6, 320, 896, 6144), "32M": (8, 512, 1408, 8192)}
"""name -> layers, hidden, inner, vocabulary of the models that are measured."""
HEAD_DIM = 32


@dataclass(kw_only=True)
class CalibrateConfig:
    """Every setting of `python -m recipes.calibrate`."""

    output: str = "calibration"
    num_processes: int = 2
    """Processes that work at the same time: the devices of the pools that will be planned for."""
    precision: Precision = Precision.bf16
    engine: str = "fsdp"
    generation_engine: str = "vllm"
    memory_gb: float = 8.0
    """Memory of one process to plan with."""
    repeats: int = 3
    """The fastest of this many counts (after one that warms up)."""
    models: list[str] = field(default_factory=lambda: list(SIZES))
    """Which of SIZES; at least two, or overheads cannot be told from work."""
    rows: list[int] = field(default_factory=lambda: [8, 32])
    """Of forward passes and training steps."""
    generation_rows: list[int] = field(default_factory=lambda: [8, 16, 32])
    prompt: int = 8
    response: int = 64
    whole_steps: bool = True
    """End with some steps of recipes.ppo, in a pool of one rank and in one of all."""

    @property
    def threads_per_process(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.num_processes)


def main() -> None:
    config = OmegaConf.merge(OmegaConf.structured(CalibrateConfig), OmegaConf.from_dotlist(sys.argv[1:]))
    calibrate(cast(CalibrateConfig, OmegaConf.to_object(config)))


def calibrate(config: CalibrateConfig) -> Fit:
    """Measure, fit, write, print."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    measurements = measure(config)
    measurements.save(output / "measurements.json")
    result = fit(measurements, space=engine_space(config.precision))
    result.calibration.save(output / "calibration.json")
    Cluster(groups=(NodeGroup(kind=result.kind, num_nodes=1),)).save(output / "cluster.json")
    if config.whole_steps:
        runs = []
        for ranks in sorted({1, config.num_processes}):
            runs.append(run_steps(output, ranks, config.threads_per_process, config.precision, config.engine))
            result = replace(result, calibration=refine(result.calibration, runs[-1:]))
            result.calibration.save(output / "calibration.json")
        save_runs(runs, output / "whole_steps.json")
    rows = [(name, f"{median:.0%}", f"{largest:.0%}") for name, (median, largest) in result.errors.items()]
    print(table(("fitted", "median error", "largest error"), rows))
    return result


def measure(config: CalibrateConfig) -> Measurements:
    """Starts the processes and takes the mean over them. Generation is measured on every second model:
    engines start slowly."""
    unknown = sorted(set(config.models) - set(SIZES))
    if unknown:
        raise ValueError(f"models: unknown {unknown}; known: {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory() as directory:
        for name in config.models:
            make_model(Path(directory) / name, name)
        context = mp.get_context("spawn")
        barrier, queue = context.Barrier(config.num_processes), context.SimpleQueue()
        processes = [
            context.Process(target=_measure_rank, args=(rank, config, directory, barrier, queue))
            for rank in range(config.num_processes)
        ]
        with environment(
            {} if torch.cuda.is_available() else KEEP_FREED_MEMORY
        ):  # glibc reads it when a process starts
            for process in processes:
                process.start()
        results = [queue.get() for _ in processes]
        for process in processes:
            process.join()
    failed = [result for result in results if isinstance(result, str)]
    if failed:
        first = next((text for text in failed if "BrokenBarrierError" not in text), failed[0])
        raise RuntimeError(f"calibration failed in a process:\n{first}")
    return mean_of(results)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Of the processes that are started in the meantime."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def mean_of(results: list[Measurements]) -> Measurements:
    """The processes measured the same samples in the same order."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def merged(samples: list[Any]) -> Any:
        return replace(samples[0], seconds=mean([sample.seconds for sample in samples]))

    return replace(
        results[0],
        matmul_flops=mean([result.matmul_flops for result in results]),
        memory_bandwidth=mean([result.memory_bandwidth for result in results]),
        passes=tuple(
            merged(list(samples)) for samples in zip(*(result.passes for result in results), strict=True)
        ),
        generations=tuple(
            merged(list(samples)) for samples in zip(*(result.generations for result in results), strict=True)
        ),
        collectives=tuple(
            merged(list(samples)) for samples in zip(*(result.collectives for result in results), strict=True)
        ),
        syncs=tuple(
            merged(list(samples)) for samples in zip(*(result.syncs for result in results), strict=True)
        ),
    )


def make_model(directory: Path, name: str) -> None:
    """A random Qwen2 of one of the SIZES as a Hugging Face directory."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, hidden, inner, vocab = SIZES[name]
    heads = hidden // HEAD_DIM
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocab, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(directory)


def _measure_rank(rank: int, config: CalibrateConfig, directory: str, barrier: Any, queue: Any) -> None:
    """AlgorithmEntry point of a process; sends its measurements, or the traceback as text."""
    import traceback

    try:
        queue.put(Rank(rank, config, Path(directory), barrier).run())
    except BaseException:  # a process boundary: the parent raises it
        queue.put(traceback.format_exc())
        barrier.abort()
        raise


if __name__ == "__main__":
    main()
