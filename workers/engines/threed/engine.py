"""Engine `threed`: pipeline x tensor x data parallelism with a ZeRO-1 optimizer, the paper's Megatron
position, in plain PyTorch.

threed_layout.py     which layouts fit; which layers a stage holds
threed_schedule.py   1F1B and interleaved 1F1B as timetables
threed_stages.py     a stage of a Hugging Face model
threed_pipeline.py   runs the timetable: passes and messages of any shape
threed_optimizer.py  flat buffers, gradient sums, AdamW split over data ranks
tensor_parallel.py   tensor and sequence parallelism, shared with engine fsdp

Data ranks need not have equally many micro-batches: they meet only at the end of a step. Left out: context
parallelism (axis cp has size 1), experts, and splitting of single sequences over pipeline time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import LocalParameter, LocalShard
from workers.config import ModelConfig, TrainConfig
from workers.engines.base import Head, LossFn, Outputs, TrainingEngine
from workers.engines.model.loading import ModelSource, model_config
from workers.engines.model.tensor_parallel import pad_time
from workers.engines.shared.export import write_safetensors
from workers.engines.shared.micro_batches import MicroBatch, gather_outputs, make_micro_batches
from workers.engines.threed.build import build_share
from workers.engines.threed.checkpoint import load_state, master_parameters, save_state
from workers.engines.threed.layout import check_layout
from workers.engines.threed.optimizer import ZeroOptimizer
from workers.losses.reduction import combine_metrics
from workers.sequences import Sequences

MICRO_BATCHES_PER_STAGE = 4
"""A pipeline of p ranks gets about 4 p micro-batches where the batch is large enough: a fifth of the time is
idle at most."""
MIN_MICRO_BATCH_TOKENS = 512
"""Smaller micro-batches than this cost more than an idle pipeline."""


class ThreeDEngine(TrainingEngine):
    """See TrainingEngine; config.tp, pp, rank_order, pipeline_schedule and virtual_stages give the layout,
    data ranks are what is left."""

    @classmethod
    def check(cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int) -> None:
        check_layout(model, config, world_size)

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        return replace(space, zero_stages=(1,))

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return 1

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return False

    def __init__(
        self,
        *,
        model: ModelConfig,
        config: TrainConfig,
        head: Head,
        context: RankContext,
        trains: bool = True,
        seed: int = 0,
    ) -> None:
        del trains  # memory for training is taken by the first step
        self.hf_config = model_config(model, head)
        self.check(self.hf_config, config, head, context.world_size)
        self.layout = self.make_layout(config, context.world_size)
        self.model, self.config, self.head = model, config, head
        self.rank, self.place = context.rank, self.layout.coordinates(context.rank)
        self.device = torch.device(context.device)
        source = ModelSource(model, head, context, seed)
        self._generation_config = source.generation_config
        self._share = build_share(source, model, config, head, self.layout, context.rank, self.device)
        self._optimizer = ZeroOptimizer(self._share.groups, config.optimizer)
        self._on_host = False
        if config.offload_optimizer:
            self.offload()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses and outputs."""
        return self.place["pp"] == self.config.pp - 1

    def forward(
        self, sequences: Sequences, *, entropy: bool = False, temperature: float = 1.0
    ) -> Outputs | None:
        micro_batches = self._micro_batches(sequences)
        results: list[Outputs] = [Outputs()] * len(micro_batches)

        def finish(index: int, numbers: dict[str, Tensor]) -> Tensor:
            results[index] = Outputs(**numbers)
            return next(iter(numbers.values()))

        self._share.pipeline.run(micro_batches, finish, train=False, entropy=entropy, temperature=temperature)
        if not self.is_last_stage:
            return None
        return (
            gather_outputs(micro_batches, results, sequences)
            if micro_batches
            else _nothing(self.head, entropy)
        )

    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, *, entropy: bool = False, temperature: float = 1.0
    ) -> dict[str, float]:
        micro_batches = self._micro_batches(sequences)
        metrics: dict[str, Tensor] = {}

        def finish(index: int, numbers: dict[str, Tensor]) -> Tensor:
            loss, parts = loss_fn(Outputs(**numbers), micro_batches[index].sequences)
            detached = {name: value.detach().double() for name, value in {"loss": loss, **parts}.items()}
            metrics.update(combine_metrics(metrics, detached))
            return loss

        self._optimizer.begin_step()
        self._share.pipeline.run(micro_batches, finish, train=True, entropy=entropy, temperature=temperature)
        with self._on_device():
            grad_norm, rate = self._optimizer.step()
        return {**self._over_ranks(metrics), "grad_norm": grad_norm, "learning_rate": rate}

    def local_parameters(self) -> list[LocalParameter]:
        held = {
            piece.name: LocalShard(piece.box, view)
            for group in self._share.groups
            for piece, view in zip(group.pieces, group.views(group.weights), strict=True)
        }
        dtype = self._share.pipeline.dtype
        return [
            LocalParameter(name, shape, dtype, (held[name],) if name in held else ())
            for name, shape in self._share.logical.items()
        ]

    def save(self, directory: Path) -> None:
        with self._on_device():
            save_state(
                self._optimizer,
                directory,
                writes_replicated=self.place["tp"] == 0,
                writes_tied=self.place["pp"] == 0,
            )

    def load(self, directory: Path) -> None:
        with self._on_device():
            load_state(self._optimizer, directory)

    def save_pretrained(self, directory: Path) -> None:
        if self.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            config = copy.deepcopy(self.hf_config)
            config.architectures, config.dtype = [self._share.architecture], torch.float32
            config.save_pretrained(directory)
            if self._generation_config is not None:
                self._generation_config.save_pretrained(directory)
        with self._on_device():
            write_safetensors(
                master_parameters(self._share.groups, self._share.logical), directory, self.device
            )

    def offload(self) -> None:
        self._optimizer.free_gradients()
        self._optimizer.move(torch.device("cpu"))
        self._on_host = True

    def onload(self) -> None:
        self._optimizer.move(self.device)
        self._on_host = False

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """For collectives on optimizer states, which may be on the host."""
        was_on_host = self._on_host
        if was_on_host:
            self.onload()
        yield
        if was_on_host:
            self.offload()

    def _micro_batches(self, sequences: Sequences) -> list[MicroBatch]:
        """The same on all ranks of this data coordinate; none if there are no rows."""
        budget = self.config.micro_batch_tokens
        if self.config.pp > 1:
            share = -(-int(sequences.lengths.sum()) // (MICRO_BATCHES_PER_STAGE * self.config.pp))
            budget = min(budget, max(share, MIN_MICRO_BATCH_TOKENS))
        cut = make_micro_batches(sequences, self.head, budget, self.device, packing=self.config.packing)
        return [pad_time(micro_batch, self.config.tp) for micro_batch in cut]

    def _over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of all data ranks, combined in rank order on every rank; their names are known on last
        stages with rows only."""
        counts = self.is_last_stage and self.place["tp"] == 0
        own = {name: float(value) for name, value in metrics.items()} if counts else {}
        everywhere: list[dict[str, float]] = [{} for _ in range(self.layout.size)]
        dist.all_gather_object(everywhere, own)
        total: dict[str, Tensor] = {}
        for part in everywhere:
            total = combine_metrics(
                total, {name: torch.tensor(value, dtype=torch.float64) for name, value in part.items()}
            )
        return {name: float(value) for name, value in total.items()}


def _nothing(head: Head, entropy: bool) -> Outputs:
    """The outputs of no rows."""
    empty = torch.zeros(0)
    if head is Head.lm:
        return Outputs(log_probs=empty, entropy=empty if entropy else None)
    return Outputs(values=empty) if head is Head.value else Outputs(scores=empty)
