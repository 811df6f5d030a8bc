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

import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from hybridflow.results import Metrics
from workers.actor_training import ActorTrainingWorker
from workers.engines.base import LossFn
from workers.generation.config import SamplingConfig
from workers.layouts import generation_grouping, training_layout
from workers.mini_batches import MiniBatches
from workers.role_config import ActorConfig
from workers.roles import Actor
from workers.sampler import Sampler, probe_settings
from workers.sequences import Sequences
from workers.weight_sync import WeightSync


class ActorWorker(ActorTrainingWorker, Actor):
    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        config = self.config
        self.memory_metrics: dict[str, float] = {}
        """Seconds and bytes of the latest changes between training and generation."""
        self._memory_owner = ""
        """"training" or "generation", once either has taken the memory
        (release_during_training)."""
        self.sampler = Sampler(config, context, generation_grouping(config, self.layout).layout)
        tolerance, vocab_size = probe_settings(config)
        self.sync = WeightSync(
            self.engine,
            self.sampler.engine,
            self.sampler.make_destination,
            probe_tolerance=tolerance,
            vocab_size=vocab_size,
            node=context.node,
            share_memory=not config.generation.release_during_training,
        )
        specs = []
        for parameter in self.engine.local_parameters():
            dtype = str(parameter.dtype).removeprefix("torch.")
            specs.append(ParameterSpec(parameter.name, parameter.shape, dtype))
        self.sync.make_destination(specs).release()

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        training = training_layout(config.train, world_size, "actor")
        return {"train": training, "generation": generation_grouping(config, training).layout}

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        self._to_generation()
        return self.sampler.generate(prompts, sampling, do_sample=do_sample)

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
        self.sampler.engine.close()

    def _to_generation(self) -> None:
        """Steps 1 and 2: wakes the generation engine and brings it the latest weights."""
        if self.config.generation.release_during_training and self._memory_owner != "generation":
            self._memory_owner = "generation"
            with self._measured("offload") as moved:
                before = allocated_bytes(self.context.device)
                self.engine.offload()
                moved.num_bytes = before - allocated_bytes(self.context.device)
            with self._measured("wake"):
                self.sampler.engine.wake()
        if self.sampler.engine.weight_version != self.weight_version:
            self.sync.run(self.weight_version)

    def to_training(self) -> None:
        """Step 4: gives the memory to the trainer."""
        if self.config.generation.release_during_training and self._memory_owner != "training":
            self._memory_owner = "training"
            with self._measured("release") as freed:
                freed.num_bytes = self.sampler.engine.sleep()
            with self._measured("onload"):
                self.engine.onload()

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
