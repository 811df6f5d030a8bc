"""Engine `deepspeed`: data parallelism with ZeRO stage 1, 2 or 3 through deepspeed.initialize.

deepspeed_setup.py       the import, the settings, a model that DeepSpeed takes over
deepspeed_partitions.py  which elements of which parameter a rank owns, whatever the stage
deepspeed_checkpoint.py  checkpoints that load on any number of ranks, and on the other engines

DeepSpeed shards, gathers, reduces and steps; what engines share is not left to it: micro-batches, sums in
place of means, clipping by a norm that is added up in float64, the schedule. Left out: tensor and pipeline
parallelism, NVMe, and DeepSpeed's own checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from workers.config import ModelConfig, TrainConfig
from workers.engines.base import Head, LossFn, Outputs, TrainingEngine
from workers.engines.deepspeed.checkpoint import load_state, master_parameters, save_state
from workers.engines.deepspeed.partitions import MOMENTS, Partitions, partitions, shard_range
from workers.engines.deepspeed.setup import ZeroModel
from workers.engines.model.loading import ModelSource, model_config
from workers.engines.shared.export import write_safetensors
from workers.engines.shared.micro_batches import (
    MicroBatch,
    empty_micro_batch,
    gather_outputs,
    make_micro_batches,
)
from workers.engines.shared.optimizer import (
    check_optimizer_config,
    learning_rate,
    set_learning_rate,
    sum_of_squares,
)
from workers.losses.reduction import combine_metrics
from workers.sequences import Sequences

STAGES = (1, 2, 3)
"""Values of train.zero_stage."""


class DeepspeedEngine(TrainingEngine):
    """See TrainingEngine; config.zero_stage says what is sharded: optimizer (1), gradients (2), weights (3).
    Every rank is a data rank."""

    library: ClassVar[str] = "deepspeed"

    @classmethod
    def check(cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int) -> None:
        for axis, size in (("pp", config.pp), ("tp", config.tp)):
            if size != 1:
                raise ValueError(
                    f"train.{axis} is {size}, but engine deepspeed is data parallel only; set {axis}=1 or "
                    "engine=threed"
                )
        if config.zero_stage not in STAGES:
            raise ValueError(
                f"train.zero_stage is {config.zero_stage}; use 1 (optimizer), 2 (and gradients) or 3 (and "
                "weights)"
            )

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        return replace(space, max_pipeline=1, max_tensor=1, zero_stages=STAGES)

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return config.zero_stage

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return config.zero_stage == 3

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
        self.check(model_config(model, head), config, head, context.world_size)
        self.layout = self.make_layout(config, context.world_size)
        check_optimizer_config(config.optimizer)
        self.config, self.head, self.context = config, head, context
        self.device = torch.device(context.device)
        source = ModelSource(model, head, context, seed)
        self._hf_config, self._generation_config = (
            copy.deepcopy(source.model.config),
            source.generation_config,
        )
        self._hf_config.architectures = [type(source.model).__name__]
        self._zero = ZeroModel(source, head, config, self.device, trains=trains)
        self._num_steps = 0
        self._state_on_host = False
        self._partitions: Partitions | None = None
        if self._zero.adam is not None:
            self._partitions = partitions(self._zero.engine.optimizer, self._zero.adam, self._zero.parameters)
            self._restore_originals(self._partitions)
            if config.offload_optimizer:
                self.offload()

    def forward(self, sequences: Sequences, *, entropy: bool = False, temperature: float = 1.0) -> Outputs:
        with torch.no_grad():
            micro_batches = self._micro_batches(sequences, equal=self.config.zero_stage == 3)
            outputs = [self._run(micro_batch, entropy, temperature) for micro_batch in micro_batches]
        return gather_outputs(micro_batches, outputs, sequences)

    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, *, entropy: bool = False, temperature: float = 1.0
    ) -> dict[str, float]:
        owned = self._owned
        finished = False
        try:
            metrics = self._accumulate(
                self._micro_batches(sequences, equal=True), loss_fn, entropy, temperature
            )
            gradients = owned.gradients()
            grad_norm = self._norm(gradients)
            if not isfinite(grad_norm):
                where = self._not_finite(gradients)
                raise RuntimeError(
                    f"grad_norm is {grad_norm}: the gradient is not finite in {where}; the weights were not "
                    "changed"
                )
            limit = self.config.optimizer.clip_grad_norm
            if 0 < limit < grad_norm:
                torch._foreach_mul_(
                    [part for parts in gradients for part in parts], limit / (grad_norm + 1e-6)
                )
            finished = True
        finally:
            if not finished:
                owned.drop_gradients()
        rate = self._update(owned)
        return {**self._over_ranks(metrics), "grad_norm": grad_norm, "learning_rate": rate}

    def local_parameters(self) -> list[LocalParameter]:
        made = []
        for name, shape in self._zero.shapes.items():
            parameter = self._zero.parameters[name]
            made.append(LocalParameter(name, shape, self._zero.dtype, tuple(self._shards(shape, parameter))))
        return made

    def save(self, directory: Path) -> None:
        with self._state_on_device():
            save_state(self._owned, self._zero.shapes, self._num_steps, directory)

    def load(self, directory: Path) -> None:
        with self._state_on_device():
            self._num_steps = load_state(self._owned, self._zero.shapes, directory)

    def save_pretrained(self, directory: Path) -> None:
        if self.context.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._hf_config.dtype = torch.float32
            self._hf_config.save_pretrained(directory)
            if self._generation_config is not None:
                self._generation_config.save_pretrained(directory)
        with self._state_on_device():
            write_safetensors(master_parameters(self._owned, self._zero.shapes), directory, self.device)

    def offload(self) -> None:
        self._move(torch.device("cpu"))
        self._state_on_host = True

    def onload(self) -> None:
        self._move(self.device)
        self._state_on_host = False

    @property
    def _owned(self) -> Partitions:
        assert self._partitions is not None, "the engine was built with trains=False"
        return self._partitions

    def _run(self, micro_batch: MicroBatch, entropy: bool, temperature: float) -> Outputs:
        ids, reads, targets, packing = (
            micro_batch.input_ids,
            micro_batch.read_positions,
            micro_batch.targets,
            micro_batch.packing,
        )
        return Outputs(
            **self._zero.run(ids, reads, targets, packing=packing, entropy=entropy, temperature=temperature)
        )

    def _micro_batches(self, sequences: Sequences, *, equal: bool) -> list[MicroBatch]:
        """At least one; as many on every rank where passes have collectives inside."""
        packing = self.config.packing
        made = make_micro_batches(
            sequences, self.head, self.config.micro_batch_tokens, self.device, packing=packing
        )
        wanted = max(1, len(made))
        if equal and self.layout.size > 1:
            most = torch.tensor(wanted, device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            wanted = int(most)
        return made + [
            empty_micro_batch(sequences, self.head, self.device, packing=packing)
            for _ in range(wanted - len(made))
        ]

    def _accumulate(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, entropy: bool, temperature: float
    ) -> dict[str, Tensor]:
        """Gradients of the summed loss of all micro-batches and ranks; the metrics of this rank."""
        metrics: dict[str, Tensor] = {}
        engine = self._zero.engine
        for index, micro_batch in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, parts = loss_fn(self._run(micro_batch, entropy, temperature), micro_batch.sequences)
            # DeepSpeed takes the mean over ranks; a loss here is a sum.
            engine.backward(loss * self.layout.size, scale_wrt_gas=False)
            parts = {"loss": loss, **parts}
            metrics = combine_metrics(
                metrics, {name: value.detach().double() for name, value in parts.items()}
            )
        return metrics

    def _update(self, owned: Partitions) -> float:
        """One AdamW step with the gradients there are; the learning rate used."""
        rate = learning_rate(self.config.optimizer, self._num_steps)
        set_learning_rate(owned.adam, rate)
        with self._state_on_device():
            owned.states()
            self._zero.engine.step()
        self._num_steps += 1
        return rate

    def _norm(self, gradients: list[list[Tensor]]) -> float:
        """L2 norm of the whole gradient; every rank holds other elements of it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for parts in gradients:
            for part in parts:
                total += sum_of_squares(part)
        dist.all_reduce(total)
        return float(total.sqrt())

    def _not_finite(self, gradients: list[list[Tensor]]) -> str:
        flat = [torch.cat([part.reshape(-1) for part in parts]) for parts in gradients]
        names = [
            piece.name
            for piece in self._owned.fragments
            if not bool(torch.isfinite(piece.of(flat[piece.group])).all())
        ]
        return (
            ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            if names
            else "parameters of other ranks"
        )

    def _over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of all ranks, combined in rank order on every rank; one small collective."""
        names = sorted(metrics)
        own = torch.stack([metrics[name] for name in names])
        every = own.new_empty(self.layout.size * len(names))
        dist.all_gather_single(every, own)
        total: dict[str, Tensor] = {}
        for numbers in every.cpu().view(-1, len(names)):
            total = combine_metrics(total, dict(zip(names, numbers, strict=True)))
        return {name: float(total[name]) for name in metrics}

    def _shards(self, shape: tuple[int, ...], parameter: nn.Parameter) -> Iterator[LocalShard]:
        """Views of the working weights: all of a parameter, or, under stage 3, the boxes of the rank's flat
        range of it."""
        if self.config.zero_stage < 3:
            yield LocalShard(Box((0,) * len(shape), shape), parameter.detach())
            return
        begin, end = shard_range(parameter)
        flat: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
        for box in flat_range_boxes(shape, begin, end):
            yield LocalShard(box, flat[: box.numel].view(box.shape))
            flat = flat[box.numel :]

    def _restore_originals(self, owned: Partitions) -> None:
        """Master weights start from the float32 checkpoint, not from its rounding to bfloat16."""
        masters = owned.masters
        for piece in owned.fragments:
            original = self._zero.originals.pop(piece.name, None)
            if original is not None:
                part = original if self.config.zero_stage == 3 else original[piece.begin : piece.end]
                piece.of(masters[piece.group].detach()).copy_(part)
        self._zero.originals.clear()

    @contextmanager
    def _state_on_device(self) -> Iterator[None]:
        """Within, master weights and moments are where the model is, wherever offload has put them."""
        if self._state_on_host:
            self._move(self.device)
        yield
        if self._state_on_host:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        if self._partitions is None:
            return
        for state in self._partitions.adam.state.values():
            for name in (*MOMENTS, "step"):
                state[name] = state[name].to(device)
        # Stage 3 in float32 has no master weights beside the working ones.
        if self.config.zero_stage < 3 or self._zero.dtype is not torch.float32:
            for master in self._partitions.masters:
                master.data = master.data.to(device)
