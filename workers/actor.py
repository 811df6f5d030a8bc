"""ActorWorker: the hybrid engine, which trains and generates with one set of weights in one pool,
each in a layout of its own.

An iteration is the paper's five steps (docs/paper.md section 3): weights into the generation layout
(only when they changed), generate, return the results, back to the training layout, train.
split_actor.py has the two halves in pools of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from hybridflow.results import Metrics
from workers.actor_training import ActorTrainingWorker
from workers.adapter_sync import sends_adapter
from workers.engines.base import LossFn
from workers.generation.config import SamplingConfig
from workers.layouts import generation_grouping, training_layout
from workers.mini_batches import MiniBatches
from workers.precision import with_native_precision
from workers.process_memory import begin_peak, device_bytes, give_back, peak_bytes
from workers.role_config import ActorConfig
from workers.roles import Actor, Progress, StreamingGenerator
from workers.row_stream import RowStream, Stream
from workers.sampler import Sampler, further_writes, probe_settings
from workers.sequences import Sequences
from workers.weight_sync import WeightSync


class ActorWorker(ActorTrainingWorker, Actor, StreamingGenerator):
    """The policy that generates responses and is trained on them, both in one pool: the weights go
    to the generation engine before the first generation after an update.

    actor = spawn(ActorWorker, pool, ActorConfig(model=...), role="actor")
    """

    sampler_class: ClassVar[type[Sampler]] = Sampler

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        config = with_native_precision(config, context.device)
        self.memory_metrics: dict[str, float] = {}
        """Seconds and bytes of the latest changes between training and generation."""
        self._releases = bool(config.generation.release_during_training)
        self._generation_awake = True
        self._state_offloaded = False
        """For generation: to_training brings it back."""
        layout = self.layouts(config, context.world_size)["generation"]
        adapter = sends_adapter(config)
        if self._releases:
            # The engine measures and takes its share of the device while nothing else is there, and
            # sleeps while the trainer is built.
            self.sampler = self.sampler_class(config, context, layout, adapter=adapter)
            self.release_generation()
        super().__init__(config, context)
        if self._releases:
            self.pool_memory.holders.add(self)
        else:
            self.sampler = self.sampler_class(config, context, layout, adapter=adapter)
        self.stream = self.make_stream()
        tolerance, vocab_size = probe_settings(config)
        self.sync = WeightSync(
            self.engine,
            self.sampler.engine,
            self.sampler.make_destination,
            probe_tolerance=tolerance,
            vocab_size=vocab_size,
            node=context.node,
            share_memory=not self._releases,
            adapter=adapter,
        )
        specs = []
        for parameter in self.sync.make_source().parameters:
            dtype = str(parameter.dtype).removeprefix("torch.")
            specs.append(ParameterSpec(parameter.name, parameter.shape, dtype))
        if self._releases:
            self.sampler.engine.wake()
            self._generation_awake = True
        self.sync.make_destination(specs).release()
        self.release_generation()

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        training = training_layout(config.train, world_size, "actor")
        return {"train": training, "generation": generation_grouping(config, training).layout}

    @classmethod
    def further_writes(cls, config: ActorConfig) -> dict[str, tuple[str, ...]]:
        return further_writes(config)

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        device = self.context.device
        begin_peak(device)
        self._to_generation()
        answers = self.sampler.generate(prompts, sampling, do_sample=do_sample)
        self.memory_metrics["actor/memory/generation_peak_bytes"] = float(peak_bytes(device))
        device_bytes(device)
        return answers

    def make_stream(self) -> Stream:
        """The rows that are drawn in slices."""
        return RowStream(self.sampler)

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        self.stream.submit(prompts, do_sample=do_sample)

    def advance(self, limit: int) -> Progress:
        self._to_generation()
        return self.stream.advance(limit)

    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        return self.stream.collect(rows, do_sample=do_sample)

    def discard(self) -> None:
        self.stream.discard()

    def update_actor(self, batch: Batch) -> Metrics:
        self.to_training()
        return super().update_actor(batch) | sync_metrics(self.sync) | self.memory_metrics

    def update(
        self,
        mini_batches: MiniBatches,
        steps: Iterable[Sequences],
        loss_fn: LossFn,
        temperature: float = 1.0,
    ) -> Metrics:
        metrics = super().update(mini_batches, steps, loss_fn, temperature)
        return metrics | sync_metrics(self.sync) | self.memory_metrics

    def load_checkpoint(self, directory: str, stamp: str | None = None) -> None:
        super().load_checkpoint(directory, stamp)
        self.sampler.engine.weight_version = -1

    def close(self) -> None:
        self.stream.close()
        self.pool_memory.holders.discard(self)
        self.sampler.close()

    def _to_generation(self) -> None:
        """Steps 1 and 2: wakes the generation engine and brings it the latest weights."""
        if not self._generation_awake:
            with self._measured("offload") as moved:
                before = allocated_bytes(self.context.device)
                self.pool_memory.for_generation()
                moved.num_bytes = before - allocated_bytes(self.context.device)
            self._state_offloaded = True
            give_back(self.context.device)
            with self._measured("wake"):
                self.sampler.engine.wake()
            self._generation_awake = True
        if self.sampler.engine.weight_version != self.weight_version:
            self.sync.run(self.weight_version)
            give_back(self.context.device)

    def to_training(self) -> None:
        """Step 4: gives the memory to the trainer."""
        super().to_training()
        if self._state_offloaded:
            self._state_offloaded = False
            with self._measured("onload"):
                self.engine.onload()

    def release_generation(self) -> None:
        """Puts the generation engine to sleep where it is awake and the settings release it: its
        memory is free until the next generation wakes it."""
        if not (self._releases and self._generation_awake):
            return
        self._generation_awake = False
        with self._measured("release") as freed:
            freed.num_bytes = self.sampler.engine.sleep()
        give_back(self.sampler.context.device)

    @contextmanager
    def _measured(self, name: str) -> Iterator[Moved]:
        """Records the seconds of one change of the memory's owner, and the bytes if the body
        sets them."""
        started, moved = time.perf_counter(), Moved()
        yield moved
        self.memory_metrics[f"memory/{name}_s"] = time.perf_counter() - started
        if moved.num_bytes is not None:
            self.memory_metrics[f"memory/{name}_bytes"] = float(moved.num_bytes)


@dataclass
class Moved:
    """The result of a change of the memory's owner."""

    num_bytes: int | None = None
    """None where the change did not measure bytes."""


def allocated_bytes(device: str) -> int:
    """Bytes of tensors on an accelerator; 0 on CPU, where offloading has nothing to move."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def sync_metrics(sync: WeightSync) -> dict[str, float]:
    """The report of the last sync as metrics; none before the first."""
    if sync.last is None:
        return {}
    return {f"sync/{name}": float(value) for name, value in asdict(sync.last).items()}
