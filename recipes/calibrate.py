"""Measure this machine for a minute or two and fit the mapper's constants to it.

    python -m recipes.calibrate output=calibration      # writes calibration.json, cluster.json, measurements
    python -m recipes.plan ... calibration=calibration/calibration.json cluster=calibration/cluster.json

Runs the real engines on small random models, in as many processes at once as a pool of this machine
has, so that the numbers include what the processes take from each other; fits constants to the
measurements (hybridflow/mapping/calibrate/fit.py); and ends with a few steps of recipes.ppo, on one
rank and on all, for overheads that only a whole step has (recipes/calibration_run.py). Links
between machines are not measured. Settings are the fields of CalibrateConfig
(recipes/calibration_config.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
import torch.multiprocessing as mp

from hybridflow.devices import KEEP_FREED_MEMORY, preloaded_allocator
from hybridflow.mapping.answer.explain import table
from hybridflow.mapping.calibrate.compare import save_runs
from hybridflow.mapping.calibrate.fit import Fit, fit, refine
from hybridflow.mapping.calibrate.measurements import (
    CollectiveSample,
    GenerationSample,
    Measurements,
    PassSample,
    SyncSample,
)
from hybridflow.mapping.question.cluster import Cluster, NodeGroup
from recipes.arguments import HELP, read_arguments, usage
from recipes.calibration_config import SIZES, CalibrateConfig, check, for_devices
from recipes.calibration_rank import Rank
from recipes.calibration_run import run_steps
from recipes.errors import plain_errors
from recipes.mapping_settings import engine_space
from workers.engines import engine_class
from workers.generation import generation_engine_class
from workers.precision import with_native_precision

Sample = TypeVar("Sample", PassSample, GenerationSample, CollectiveSample, SyncSample)
HEAD_DIM = 32


def main() -> None:
    if {*HELP} & {*sys.argv[1:]}:
        print(usage(__doc__, CalibrateConfig, "recipes/calibration_config.py"))
        return
    with plain_errors():
        calibrate(read_arguments(CalibrateConfig, sys.argv[1:], paths=["output"]))


def calibrate(config: CalibrateConfig) -> Fit:
    """Measure, fit, write, print."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    config = for_devices(config, num_gpus)
    check(config, num_gpus)
    config = with_native_precision(config, "cuda" if num_gpus else "cpu")
    engine_class(config.engine)
    generation_engine_class(config.generation_engine)
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
            runs.append(run_steps(output, ranks, config))
            result = replace(result, calibration=refine(result.calibration, runs[-1:]))
            result.calibration.save(output / "calibration.json")
        save_runs(runs, output / "whole_steps.json")
    rows = []
    for name, (median, largest) in result.errors.items():
        rows.append((name, f"{median:.0%}", f"{largest:.0%}"))
    print(table(("fitted", "median error", "largest error"), rows))
    return result


def measure(config: CalibrateConfig) -> Measurements:
    """Starts the processes and takes the mean over them. Generation is measured on every second
    model: engines start slowly."""
    with tempfile.TemporaryDirectory() as directory:
        for name in config.models:
            make_model(Path(directory) / name, name)
        context = mp.get_context("spawn")
        barrier, queue = context.Barrier(config.num_processes), context.SimpleQueue()
        processes = []
        for rank in range(config.num_processes):
            arguments = (rank, config, directory, barrier, queue)
            processes.append(context.Process(target=_measure_rank, args=arguments))
        allocator: dict[str, str] = {}
        if not torch.cuda.is_available():
            allocator = KEEP_FREED_MEMORY | preloaded_allocator()
        with environment(allocator):  # read when a process starts
            for process in processes:
                process.start()
        results = [queue.get() for _ in processes]
        for process in processes:
            process.join()
    failed = [result for result in results if isinstance(result, str)]
    if failed:
        failed.sort(key=lambda text: "BrokenBarrierError" in text)  # what follows from the others
        raise RuntimeError(f"calibration failed in a process:\n{failed[0]}")
    return mean_of(results)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started in the meantime."""
    before = dict(zip(variables, map(os.environ.get, variables), strict=True))
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
    """Means over the processes, which measured the same samples in the same order."""
    return replace(
        results[0],
        matmul_flops=fmean(result.matmul_flops for result in results),
        memory_bandwidth=fmean(result.memory_bandwidth for result in results),
        passes=_mean_seconds([result.passes for result in results]),
        generations=_mean_seconds([result.generations for result in results]),
        collectives=_mean_seconds([result.collectives for result in results]),
        syncs=_mean_seconds([result.syncs for result in results]),
    )


def _mean_seconds(measured: list[tuple[Sample, ...]]) -> tuple[Sample, ...]:
    """The samples of every process merged into samples with their mean seconds."""
    merged = []
    for samples in zip(*measured, strict=True):
        merged.append(replace(samples[0], seconds=fmean(sample.seconds for sample in samples)))
    return tuple(merged)


def make_model(directory: Path, name: str) -> None:
    """A random Qwen2 of one of the SIZES as a Hugging Face directory."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, hidden, inner, vocab = SIZES[name]
    heads = hidden // HEAD_DIM
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(directory)


def _measure_rank(
    rank: int, config: CalibrateConfig, directory: str, barrier: Any, queue: Any
) -> None:
    """The main of a process; sends its measurements, or the traceback as text."""
    import traceback

    try:
        queue.put(Rank(rank, config, Path(directory), barrier).run())
    except BaseException:  # a process boundary: the parent raises it
        queue.put(traceback.format_exc())
        barrier.abort()
        raise


if __name__ == "__main__":
    main()
