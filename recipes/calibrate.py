"""Measure the machine at hand for a minute or two and fit the mapper's constants to it.

    python -m recipes.calibrate output=calibration       # writes calibration.json, cluster.json and what was measured
    python -m recipes.plan ... calibration=calibration/calibration.json cluster=calibration/cluster.json

Runs the real engines on small random models, in as many processes at once as a pool of this machine has, so that what they
take from each other is in the numbers; fits what it measured (hybridflow/mapping/fit.py); and ends with a few steps of recipes.ppo
for what only a whole step shows (recipes/calibration_run.py). Links between machines are not measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from hybridflow.context import RankContext
from hybridflow.mapping.cluster import Cluster, NodeGroup
from hybridflow.mapping.compare import save_runs
from hybridflow.mapping.explain import table
from hybridflow.mapping.fit import Fit, fit, refine
from hybridflow.mapping.measurements import CollectiveSample, GenerationSample, Measurements, PassSample, SyncSample
from hybridflow.mapping.model import ModelSpec
from hybridflow.resharding import ParameterSpec
from recipes.calibration_run import run_steps
from recipes.placed import engine_space
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.generation import generation_engine_class
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.sink import WeightSink, weight_sink
from workers.sequences import Sequences
from workers.weight_sync import WeightSync

SIZES = {"3M": (4, 192, 512, 4096), "11M": (6, 320, 896, 6144), "32M": (8, 512, 1408, 8192)}
"""name -> layers, hidden, inner, vocabulary of the models that are measured."""
PASSES = {False: "forward", True: "training step"}
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
    repeats: int = 2
    """The fastest of this many counts (after one that warms up)."""
    models: list[str] = field(default_factory=lambda: list(SIZES))
    """Which of SIZES; at least two, or overheads cannot be told from work."""
    rows: list[int] = field(default_factory=lambda: [8, 32])
    prompt: int = 8
    response: int = 64
    whole_steps: bool = True
    """End with some steps of recipes.ppo."""


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
        whole = run_steps(output, config.num_processes, config.precision, config.engine)
        save_runs([whole], output / "whole_steps.json")
        result = replace(result, calibration=refine(result.calibration, [whole]))
        result.calibration.save(output / "calibration.json")
    rows = [(name, f"{median:.0%}", f"{largest:.0%}") for name, (median, largest) in result.errors.items()]
    print(table(("fitted", "median error", "largest error"), rows))
    return result


def measure(config: CalibrateConfig) -> Measurements:
    """Starts the processes and takes the mean over them. Generation is measured on every second model: engines start slowly."""
    unknown = sorted(set(config.models) - set(SIZES))
    if unknown:
        raise ValueError(f"models: unknown {unknown}; known: {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory() as directory:
        for name in config.models:
            make_model(Path(directory) / name, name)
        context = mp.get_context("spawn")
        barrier, queue = context.Barrier(config.num_processes), context.SimpleQueue()
        processes = [
            context.Process(target=_measure_rank, args=(rank, config, directory, barrier, queue)) for rank in range(config.num_processes)
        ]
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


def mean_of(results: list[Measurements]) -> Measurements:
    """The processes measured the same samples in the same order."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def merged(samples: list[Any]) -> Any:
        return replace(samples[0], seconds=mean([sample.seconds for sample in samples]))

    def drawn(samples: list[GenerationSample]) -> GenerationSample:
        return replace(merged(samples), alone_s=mean([sample.alone_s for sample in samples]))

    return replace(
        results[0],
        matmul_flops=mean([result.matmul_flops for result in results]),
        memory_bandwidth=mean([result.memory_bandwidth for result in results]),
        passes=tuple(merged(list(samples)) for samples in zip(*(result.passes for result in results), strict=True)),
        generations=tuple(drawn(list(samples)) for samples in zip(*(result.generations for result in results), strict=True)),
        collectives=tuple(merged(list(samples)) for samples in zip(*(result.collectives for result in results), strict=True)),
        syncs=tuple(merged(list(samples)) for samples in zip(*(result.syncs for result in results), strict=True)),
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
    """Entry point of a process; sends its measurements, or the traceback as text."""
    import traceback

    try:
        queue.put(Rank(rank, config, Path(directory), barrier).run())
    except BaseException:  # a process boundary: the parent raises it
        queue.put(traceback.format_exc())
        barrier.abort()
        raise


class Rank:
    """One of the processes that measure at the same time; each is a world of its own except for the collectives."""

    def __init__(self, rank: int, config: CalibrateConfig, directory: Path, barrier: Any) -> None:
        self.rank, self.config, self.directory, self.barrier = rank, config, directory, barrier
        threads = max(1, (os.cpu_count() or 1) // config.num_processes)
        torch.set_num_threads(threads)
        self.device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float32 if config.precision is Precision.fp32 else torch.bfloat16
        self.context = RankContext(role="calibration", local_rank=rank, device=self.device, num_threads=threads)

    def run(self) -> Measurements:
        self._join(self.directory / f"alone{self.rank}", 0, 1)
        passes = tuple(sample for name in self.config.models for sample in self.passes(name))
        sampled = [self.generations(name) for name in self.config.models[::2]]
        measurements = Measurements(
            name=f"{'gpu' if self.device != 'cpu' else 'cpu'}-{self.config.precision.value}",
            num_processes=self.config.num_processes,
            memory_bytes=self.config.memory_gb * 1e9,
            compute_bytes=self.dtype.itemsize,
            matmul_flops=self.matmul_flops(),
            memory_bandwidth=self.memory_bandwidth(),
            passes=passes,
            generations=tuple(sample for samples, _ in sampled for sample in samples),
            syncs=tuple(sync for _, sync in sampled),
        )
        dist.destroy_process_group()
        if self.config.num_processes == 1:
            return measurements
        self._join(self.directory / "together", self.rank, self.config.num_processes)
        collectives = tuple(self.all_gather(num_bytes) for num_bytes in (1e4, 1e6, 1e7, 1e8))
        dist.destroy_process_group()
        return replace(measurements, collectives=collectives)

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

    def alone(self, what: str, action: Callable[[], object]) -> float:
        """The same while the other processes wait for their turn."""
        seconds = 0.0
        for rank in range(self.config.num_processes):
            self.barrier.wait()
            if rank == self.rank:
                marks = [time.perf_counter()]
                for _ in range(self.config.repeats):
                    action()
                    if self.device != "cpu":
                        torch.cuda.synchronize()
                    marks.append(time.perf_counter())
                seconds = min(later - earlier for earlier, later in pairwise(marks))
        self.barrier.wait()
        if self.rank == 0:
            print(f"{what}, alone: {seconds:.4g} s", file=sys.stderr, flush=True)
        return seconds

    def matmul_flops(self) -> float:
        """Per second, of a 2048 x 1024 x 1024 product in the compute precision."""
        left = torch.randn(2048, 1024, device=self.device, dtype=self.dtype)
        right = torch.randn(1024, 1024, device=self.device, dtype=self.dtype)
        return 2 * 2048 * 1024 * 1024 * 10 / self.fastest("products", lambda: [left @ right for _ in range(10)])

    def memory_bandwidth(self) -> float:
        """Bytes per second read and written by a copy of 128 MB."""
        source = torch.ones(32 * 1024 * 1024, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.fastest("copy", lambda: target.copy_(source))

    def passes(self, name: str) -> list[PassSample]:
        """Forward passes and training steps of the engine on one model, with one and with four micro-batches."""
        config = self.config
        spec = ModelSpec.from_directory(self.directory / name)
        samples = []
        for rows in config.rows:
            for micro_batches in (1, 4):
                length = config.prompt + config.response
                engine = self._trainer(name, rows * length // micro_batches)
                sequences = self._sequences(rows, spec.vocab_size)
                for training in (False, True):
                    seconds = self.fastest(
                        f"{name} {rows} rows in {micro_batches}: {PASSES[training]}", _one_pass(engine, sequences, training)
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

    def _trainer(self, name: str, micro_batch_tokens: int) -> TrainingEngine:
        config = self.config
        train = TrainConfig(
            engine=config.engine,
            precision=config.precision,
            micro_batch_tokens=micro_batch_tokens,
            optimizer=OptimizerConfig(learning_rate=1e-9),
        )
        model = ModelConfig(path=str(self.directory / name))
        engine: TrainingEngine = cast(Any, engine_class(config.engine))(model=model, config=train, head=Head.lm, context=self.context)
        return engine

    def generations(self, name: str) -> tuple[list[GenerationSample], SyncSample]:
        """Generation calls of fixed length, with few and with many sequences at once; and a sync of the weights."""
        config = self.config
        spec = ModelSpec.from_directory(self.directory / name)
        settings = GenerationConfig(
            engine=config.generation_engine,
            precision=config.precision,
            max_model_len=4 * (config.prompt + config.response),
            max_num_seqs=max(config.rows),
        )
        engine = generation_engine_class(config.generation_engine)(
            model=ModelConfig(path=str(self.directory / name)), config=settings, context=self.context
        )
        samples = []
        for rows, response in ((rows, response) for rows in config.rows for response in (config.response // 2, config.response)):
            sampling = SamplingConfig(max_response_tokens=response, ignore_eos=True)
            prompts = [row.numpy() for row in torch.randint(2, spec.vocab_size, (rows, config.prompt))]
            seeds = torch.arange(rows).numpy()
            what, generate = f"{name} {rows} rows: {response} tokens", partial(engine.generate, prompts, seeds, sampling)
            most = rows == max(config.rows) and response == config.response
            samples.append(
                GenerationSample(
                    model=spec,
                    rows=rows,
                    prompt=config.prompt,
                    response=response,
                    seconds=self.fastest(what, generate),
                    alone_s=self.alone(what, generate) if most else 0.0,
                )
            )
        trainer = self._trainer(name, config.prompt + config.response)

        def make_sink(parameters: Sequence[ParameterSpec]) -> WeightSink:
            return weight_sink(config.generation_engine, engine, parameters, self.dtype, self.device)

        sync = WeightSync(trainer, engine, make_sink, probe_tolerance=1.0, vocab_size=spec.vocab_size)
        synced = SyncSample(model=spec, seconds=self.fastest(f"{name}: sync", partial(sync.run, 1)))
        engine.close()
        return samples, synced

    def all_gather(self, num_bytes: float) -> CollectiveSample:
        """Between the processes, of float32."""
        each = torch.ones(int(num_bytes / 4 / self.config.num_processes), device=self.device)
        whole = torch.empty(each.numel() * self.config.num_processes, device=self.device)
        seconds = self.fastest(f"all-gather of {num_bytes:.0g} bytes", lambda: dist.all_gather_into_tensor(whole, each))
        return CollectiveSample(num_bytes=whole.nbytes, ranks=self.config.num_processes, seconds=seconds)

    def _sequences(self, rows: int, vocab: int) -> Sequences:
        length = self.config.prompt + self.config.response
        return Sequences(
            token_ids=torch.randint(2, vocab, (rows * length,)),
            lengths=torch.full((rows,), length),
            scored_lengths=torch.full((rows,), self.config.response),
        )

    def _join(self, store: Path, rank: int, world_size: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(self.rank))
        backend = "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


def _one_pass(engine: TrainingEngine, sequences: Sequences, training: bool) -> Callable[[], object]:
    def loss(outputs: Outputs, part: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.log_probs is not None
        return -outputs.log_probs.sum() / sequences.num_scored_tokens, {}

    return (lambda: engine.train_step(sequences, loss)) if training else (lambda: engine.forward(sequences))


if __name__ == "__main__":
    main()
