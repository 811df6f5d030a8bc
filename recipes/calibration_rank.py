"""Rank: a process that measures for recipes.calibrate, at the same time as the others."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from hybridflow.context import RankContext
from hybridflow.mapping.calibrate.measurements import (
    CollectiveSample,
    GenerationSample,
    Measurements,
    PassSample,
    SyncSample,
)
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.resharding import ParameterSpec
from recipes.calibration_config import ON_CPUS, ON_GPUS, CalibrateConfig
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.generation import generation_engine_class
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.weight_destination import WeightDestination
from workers.sequences import Sequences
from workers.weight_sync import WeightSync

PASSES = {False: "forward", True: "training step"}


class Rank:
    """A process that measures at the same time as others; each is a world of its own except for the
    collectives."""

    def __init__(self, rank: int, config: CalibrateConfig, directory: Path, barrier: Any) -> None:
        self.rank, self.config, self.directory, self.barrier = rank, config, directory, barrier
        torch.set_num_threads(config.threads_per_process)
        self.device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
        self.amounts = ON_CPUS if self.device == "cpu" else ON_GPUS
        self.dtype = torch.float32 if config.precision is Precision.fp32 else torch.bfloat16
        self.context = RankContext(
            role="calibration",
            local_rank=rank,
            device=self.device,
            num_threads=config.threads_per_process,
        )

    def run(self) -> Measurements:
        self._join(self.directory / f"alone{self.rank}", 0, 1)
        passes: list[PassSample] = []
        for name in self.config.models:
            passes += self.passes(name)
        generations, syncs = [], []
        for name in self.config.models[::2]:
            samples, sync = self.generations(name)
            generations += samples
            syncs.append(sync)
        kind = "cpu" if self.device == "cpu" else "gpu"
        measurements = Measurements(
            name=f"{kind}-{self.config.precision.value}",
            num_processes=self.config.num_processes,
            memory_bytes=self.memory_bytes(),
            compute_bytes=self.dtype.itemsize,
            matmul_flops=self.matmul_flops(),
            memory_bandwidth=self.memory_bandwidth(),
            passes=tuple(passes),
            generations=tuple(generations),
            syncs=tuple(syncs),
        )
        dist.destroy_process_group()
        if self.config.num_processes == 1:
            return measurements
        self._join(self.directory / "together", self.rank, self.config.num_processes)
        collectives = (
            *map(self.all_gather, (1e4, 1e6, 1e7, 1e8)),
            *map(self.reduce_scatter, (1e6, 1e7, 1e8)),
        )
        self.context = replace(self.context, rank=self.rank, world_size=self.config.num_processes)
        passes += map(self.shared_step, self.config.models[1:])
        dist.destroy_process_group()
        return replace(measurements, collectives=collectives, passes=tuple(passes))

    def fastest(self, what: str, action: Callable[[], object]) -> float:
        """Seconds of the fastest repetition, all processes starting together each time."""
        seconds = []
        for _ in range(self.config.repeats + 1):
            self.barrier.wait()
            started = time.perf_counter()
            action()
            if self.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        if self.rank == 0:
            print(f"{what}: {min(seconds[1:]):.4g} s", file=sys.stderr, flush=True)
        return min(seconds[1:])

    def memory_bytes(self) -> float:
        """Bytes of the device to plan with."""
        if self.config.memory_gb:
            return self.config.memory_gb * 1e9
        return float(torch.cuda.mem_get_info(self.device)[1])

    def matmul_flops(self) -> float:
        """FLOPs per second of a product of Amounts.product in the compute precision."""
        rows, inner, columns = self.amounts.product
        left = torch.randn(rows, inner, device=self.device, dtype=self.dtype)
        right = torch.randn(inner, columns, device=self.device, dtype=self.dtype)
        seconds = self.fastest("products", lambda: [left @ right for _ in range(10)])
        return 2 * rows * inner * columns * 10 / seconds

    def memory_bandwidth(self) -> float:
        """Bytes per second read and written by a copy, larger than the device's caches."""
        source = torch.ones(self.amounts.copied, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.fastest("copy", lambda: target.copy_(source))

    def passes(self, name: str) -> list[PassSample]:
        """Forward passes and training steps of the engine on a model, with one and with four
        micro-batches."""
        samples = []
        for rows, micro_batches in product(self.config.rows, (1, 4)):
            self._forget_memory()
            samples += self._passes_of(name, rows, micro_batches)
        return samples

    def _passes_of(self, name: str, rows: int, micro_batches: int) -> list[PassSample]:
        config, spec = self.config, ModelSpec.from_directory(self.directory / name)
        length = config.prompt + config.response
        engine = self._trainer(name, rows * length // micro_batches)
        sequences = self._sequences(rows, spec.vocab_size)
        samples = []
        for training in (False, True):
            seconds = self.fastest(
                f"{name} {rows} rows in {micro_batches}: {PASSES[training]}",
                _one_pass(engine, sequences, training),
            )
            samples.append(
                PassSample(
                    model=spec,
                    rows=rows,
                    prompt=config.prompt,
                    response=config.response,
                    micro_batches=micro_batches,
                    training=training,
                    seconds=seconds,
                )
            )
        return samples

    def shared_step(self, name: str) -> PassSample:
        """A training step of all processes together, as data ranks: what its collectives take
        inside an engine."""
        config, ranks = self.config, self.config.num_processes
        rows, length = max(1, max(config.rows) // ranks), config.prompt + config.response
        spec = ModelSpec.from_directory(self.directory / name)
        step = _one_pass(
            self._trainer(name, rows * length),
            self._sequences(rows, spec.vocab_size),
            training=True,
        )
        seconds = self.fastest(f"{name} {rows} rows on each of {ranks}: {PASSES[True]}", step)
        return PassSample(
            model=spec,
            rows=rows * ranks,
            prompt=config.prompt,
            response=config.response,
            micro_batches=1,
            training=True,
            seconds=seconds,
            ranks=ranks,
        )

    def _trainer(self, name: str, micro_batch_tokens: int) -> TrainingEngine:
        config = self.config
        train = TrainConfig(
            engine=config.engine,
            precision=config.precision,
            micro_batch_tokens=micro_batch_tokens,
            optimizer=OptimizerConfig(learning_rate=1e-9),
        )
        model = ModelConfig(path=str(self.directory / name))
        engine: TrainingEngine = cast(Any, engine_class(config.engine))(
            model=model, config=train, head=Head.lm, context=self.context
        )
        return engine

    def generations(self, name: str) -> tuple[list[GenerationSample], SyncSample]:
        """Generation calls of fixed length, with few and with many sequences at once; and a
        sync of the weights."""
        config = self.config
        spec = ModelSpec.from_directory(self.directory / name)
        settings = GenerationConfig(
            engine=config.generation_engine,
            precision=config.precision,
            max_model_len=4 * (config.prompt + config.response),
            max_num_seqs=max(config.generation_rows),
        )
        engine = generation_engine_class(config.generation_engine)(
            model=ModelConfig(path=str(self.directory / name)),
            config=settings,
            context=self.context,
        )
        samples = []
        for rows, response in product(
            config.generation_rows, (config.response // 2, config.response)
        ):
            sampling = SamplingConfig(max_response_tokens=response, ignore_eos=True)
            prompts = list(torch.randint(2, spec.vocab_size, (rows, config.prompt)).numpy())
            seeds = torch.arange(rows).numpy()
            seconds = self.fastest(
                f"{name} {rows} rows: {response} tokens",
                partial(engine.generate, prompts, seeds, sampling),
            )
            samples.append(
                GenerationSample(
                    model=spec, rows=rows, prompt=config.prompt, response=response, seconds=seconds
                )
            )
        trainer = self._trainer(name, config.prompt + config.response)

        def make_destination(parameters: Sequence[ParameterSpec]) -> WeightDestination:
            return engine.weight_destination(parameters, self.dtype, self.device)

        sync = WeightSync(
            trainer, engine, make_destination, probe_tolerance=1.0, vocab_size=spec.vocab_size
        )
        synced = SyncSample(model=spec, seconds=self.fastest(f"{name}: sync", partial(sync.run, 1)))
        engine.close()
        del trainer, sync
        self._forget_memory()
        return samples, synced

    def _forget_memory(self) -> None:
        """Frees what the allocator keeps of the last engine: vLLM takes what is free at its start."""
        if self.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()

    def all_gather(self, num_bytes: float) -> CollectiveSample:
        """An all-gather of float32 between the processes."""
        each = torch.ones(int(num_bytes / 4 / self.config.num_processes), device=self.device)
        whole = torch.empty(each.numel() * self.config.num_processes, device=self.device)
        seconds = self.fastest(
            f"all-gather of {num_bytes:.0g} bytes", lambda: dist.all_gather_into_tensor(whole, each)
        )
        return CollectiveSample(
            num_bytes=whole.nbytes, ranks=self.config.num_processes, seconds=seconds
        )

    def reduce_scatter(self, num_bytes: float) -> CollectiveSample:
        """The same bytes the other way, summed: how gradients come together."""
        each = torch.ones(int(num_bytes / 4 / self.config.num_processes), device=self.device)
        whole = torch.ones(each.numel() * self.config.num_processes, device=self.device)
        seconds = self.fastest(
            f"reduce-scatter of {num_bytes:.0g} bytes",
            lambda: dist.reduce_scatter_tensor(each, whole),
        )
        return CollectiveSample(
            num_bytes=whole.nbytes, ranks=self.config.num_processes, seconds=seconds, reduces=True
        )

    def _sequences(self, rows: int, vocab: int) -> Sequences:
        length = self.config.prompt + self.config.response
        return Sequences(
            token_ids=torch.randint(2, vocab, (rows * length,)),
            lengths=torch.full((rows,), length),
            scored_lengths=torch.full((rows,), self.config.response),
        )

    def _join(self, store: Path, rank: int, world_size: int) -> None:
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(self.rank))
        backend = "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world_size
        )


def _one_pass(engine: TrainingEngine, sequences: Sequences, training: bool) -> Callable[[], object]:
    def loss(outputs: Outputs, part: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.log_probs is not None
        return -outputs.log_probs.sum() / sequences.num_scored_tokens, {}

    if training:
        return lambda: engine.train_step(sequences, loss)
    return lambda: engine.forward(sequences)
