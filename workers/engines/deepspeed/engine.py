"""Engine `deepspeed`: data parallelism with ZeRO stage 1, 2 or 3 through deepspeed.initialize.

setup.py       the import, the settings, a model that DeepSpeed takes over
partitions.py  which elements of which parameter a rank owns, whatever the stage

DeepSpeed shards, gathers, reduces and steps; what engines share is not left to it: micro-batches,
sums in place of means, clipping by a norm that is added up in float64, the schedule. Left out:
tensor and pipeline parallelism, NVMe, and DeepSpeed's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, starmap
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard, all_parameters
from workers.config import TrainConfig
from workers.engines import pipeline_engines
from workers.engines.base import Head, LossFn, Outputs
from workers.engines.deepspeed.partitions import Partitions, partitions, shard_range
from workers.engines.deepspeed.setup import BUCKET_ELEMENTS, ZeroModel
from workers.engines.model.context_parallel import check_context_parallel
from workers.engines.model.layers import check_layers
from workers.engines.model.loading import ModelSource
from workers.engines.model.routers import check_routers
from workers.engines.shared.flat_views import flat_views, named
from workers.engines.shared.metrics import add_micro_batch, metrics_of_group
from workers.engines.shared.micro_batches import (
    MicroBatch,
    gather_outputs,
    run_micro_batch,
    with_blank_image,
)
from workers.engines.shared.optimizer import (
    MODEL,
    MOMENTS,
    clip,
    learning_rate,
    set_learning_rate,
    sum_of_squares,
)
from workers.engines.shared.row_groups import axis_group
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences

STAGES = (1, 2, 3)
"""Values of train.zero_stage."""


class DeepspeedEngine(ShardedEngine):
    """See TrainingEngine; config.zero_stage says what is sharded: optimizer (1), gradients (2),
    weights (3). Every rank is a data rank, or shares rows with others (config.cp)."""

    library: ClassVar[str] = "deepspeed"
    trains_adapters = True
    lends = False  # ZeRO-3 keeps parameters in partitions of its own
    shares_rows = True
    sees_images = True

    @classmethod
    def check(
        cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int
    ) -> None:
        check_layers(model, config)
        if config.fsdp_replicas != 1:
            raise ValueError(
                f"train.fsdp_replicas is {config.fsdp_replicas}, which engine deepspeed has not; set it to "
                "1, or engine to fsdp"
            )
        if config.selective_checkpointing and config.zero_stage == 3:
            raise ValueError(
                "train.selective_checkpointing is true, but engine deepspeed gathers weights within the "
                "layers under zero_stage=3, in other operations when they are computed again; set it to "
                "false, or zero_stage to 1 or 2"
            )
        if config.compile and config.zero_stage == 3:
            raise ValueError(
                "train.compile is true, but engine deepspeed gathers the weights of each module by "
                "itself under zero_stage=3; set compile=false, or zero_stage to 1 or 2"
            )
        check_routers(model, config.router_aux_loss_coefficient)
        for axis, size in (("pp", config.pp), ("tp", config.tp)):
            if size != 1:
                raise ValueError(
                    f"train.{axis} is {size}, but engine deepspeed is data parallel only; set "
                    f"{axis}=1, or engine to one with pipeline stages: "
                    f"{pipeline_engines(with_pipeline=True)}"
                )
        check_context_parallel(model, config)
        if config.cp_by_length:
            raise ValueError(
                "train.cp_by_length is true, which engine deepspeed has not; set it to false, or "
                "engine to fsdp"
            )
        if config.zero_stage not in STAGES:
            raise ValueError(
                f"train.zero_stage is {config.zero_stage}; use 1 (optimizer), 2 (and gradients) "
                "or 3 (and weights)"
            )

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        return replace(
            space,
            max_pipeline=1,
            max_tensor=1,
            zero_stages=STAGES,
            bucket_elements=float(BUCKET_ELEMENTS),
        )

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return config.zero_stage

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return config.zero_stage == 3

    def _build(self, source: ModelSource, *, trains: bool) -> None:
        self._data_group: ProcessGroup | None = None
        if self.config.cp > 1:
            self._data_group = axis_group(self.layout, "dp")
        self._zero = ZeroModel(source, self.head, self.config, self.device, trains=trains)
        self._routers = self._zero.scored.routers
        self._num_steps = 0
        self._partitions: Partitions | None = None
        if self._zero.adam is not None:
            self._partitions = partitions(
                self._zero.engine.optimizer, self._zero.adam, self._zero.trained
            )
            self._restore_originals(self._partitions)

    def forward(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        routes: bool = False,
    ) -> Outputs:
        with torch.no_grad(), self._routers.recording(routes):
            micro_batches = self._micro_batches(sequences, alike=self.config.zero_stage == 3)
            outputs = []
            for micro_batch in micro_batches:
                outputs.append(self._run(micro_batch, entropy, temperature))
        result = gather_outputs(micro_batches, outputs, sequences)
        if routes:
            result = replace(result, routes=self._routes(micro_batches, sequences))
        return result

    def train_step(
        self,
        sequences: Sequences,
        loss_fn: LossFn,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        owned = self._owned
        with ExitStack() as on_error:
            on_error.callback(owned.drop_gradients)
            micro_batches = self._micro_batches(sequences, alike=True)
            with self._with_routers(sequences, scale=self.layout.size) as router_metrics:
                metrics = self._accumulate(micro_batches, loss_fn, entropy, temperature)
            gradients = owned.gradients()
            grad_norm = self._norm(gradients)
            flat = list(chain.from_iterable(gradients))
            limit = self.config.optimizer.clip_grad_norm
            clip(flat, grad_norm, limit, lambda: self._not_finite(gradients))
            on_error.pop_all()
        rate = self._update(owned)
        combined = metrics_of_group(metrics, self._data_group)
        return {**combined, **router_metrics, "grad_norm": grad_norm, "learning_rate": rate}

    def local_parameters(self) -> list[LocalParameter]:
        result = []
        for name, shape in self._zero.shapes.items():
            shards = tuple(self._shards(shape, self._zero.parameters[name]))
            result.append(LocalParameter(name, shape, self._zero.dtype, shards))
        return result

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def state(self, *, moments: bool, copies: bool) -> list[LocalParameter]:
        """Every element is one rank's, so there are no copies."""
        result = named(MODEL, self._master_parameters())
        if moments:
            states = self._owned.states()
            for moment in MOMENTS:
                flats = [state[moment] for state in states]
                result += named(moment, self._in_boxes(flats))
        return result

    def restored(self, num_steps: int) -> None:
        self._num_steps = num_steps
        for state in self._owned.states():
            state["step"].fill_(float(num_steps))
        self._owned.publish()

    @property
    def _owned(self) -> Partitions:
        assert self._partitions is not None, "the engine was built with trains=False"
        return self._partitions

    def _micro_batches(self, sequences: Sequences, *, alike: bool) -> list[MicroBatch]:
        """`alike`: as many on every rank, because each has collectives, those of a vision tower among
        them."""
        micro_batches = self._cut_alike(sequences, None, alike=alike)
        images = self._cutting.images
        if alike and images is not None:
            micro_batches = [with_blank_image(each, images) for each in micro_batches]
        return self._share_rows(micro_batches)

    def _run(self, micro_batch: MicroBatch, entropy: bool, temperature: float) -> Outputs:
        return run_micro_batch(
            self._zero.run, micro_batch, entropy=entropy, temperature=temperature
        )

    def _accumulate(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, entropy: bool, temperature: float
    ) -> dict[str, Tensor]:
        """Gradients of the summed loss of all micro-batches and ranks; the metrics of this rank."""
        metrics: dict[str, Tensor] = {}
        engine = self._zero.engine
        for index, micro_batch in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, parts = loss_fn(
                self._run(micro_batch, entropy, temperature), micro_batch.sequences
            )
            # DeepSpeed takes the mean over ranks; a loss here is a sum.
            engine.backward(loss * self.layout.size, scale_wrt_gas=False)
            metrics = add_micro_batch(metrics, loss, parts)
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

    def _not_finite(self, gradients: list[list[Tensor]]) -> list[str]:
        flat = []
        for parts in gradients:
            flat.append(torch.cat([part.reshape(-1) for part in parts]))
        names = []
        for piece in self._owned.fragments:
            if not bool(torch.isfinite(piece.of(flat[piece.group])).all()):
                names.append(piece.name)
        return names

    def _shards(self, shape: tuple[int, ...], parameter: nn.Parameter) -> Iterator[LocalShard]:
        """Views of the working weights: all of a parameter, or, under stage 3, the boxes of the
        rank's flat range of it."""
        if self.config.zero_stage < 3:
            yield LocalShard(Box((0,) * len(shape), shape), parameter.detach())
            return
        begin, end = shard_range(parameter)
        flat: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
        for box, view in flat_views(shape, begin, end, flat):
            yield LocalShard(box, view)

    def _restore_originals(self, owned: Partitions) -> None:
        """Master weights start from the float32 checkpoint, not from its rounding to bfloat16."""
        masters = owned.masters
        for piece in owned.fragments:
            original = self._zero.originals.pop(piece.name, None)
            if original is not None:
                part = (
                    original if self.config.zero_stage == 3 else original[piece.begin : piece.end]
                )
                piece.of(masters[piece.group].detach()).copy_(part)
        self._zero.originals.clear()

    def _master_parameters(self) -> list[LocalParameter]:
        return self._in_boxes([master.detach() for master in self._owned.masters])

    def _in_boxes(self, flats: list[Tensor]) -> list[LocalParameter]:
        """This rank's ranges of every parameter in flat buffers, as boxes; the tensors are views."""
        shapes = {name: self._zero.shapes[name] for name in self._zero.trained}
        shards: dict[str, list[LocalShard]] = {}
        for piece in self._owned.fragments:
            flat = piece.of(flats[piece.group])
            boxes = flat_views(shapes[piece.name], piece.begin, piece.end, flat)
            shards[piece.name] = list(starmap(LocalShard, boxes))
        return all_parameters(shapes, shards, torch.float32)

    def _drop_gradients(self) -> None:
        """DeepSpeed frees them after each step itself, but for the buffer of stage 3, which it
        keeps."""

    def _move_state(self, device: torch.device) -> None:
        if self._partitions is None:
            return
        move = self._host_memory.move
        for index, state in enumerate(self._partitions.adam.state.values()):
            for name in (*MOMENTS, "step"):
                state[name] = move((name, index), state[name], device)
        # Stage 3 in float32 has no master weights beside the working ones.
        if self.config.zero_stage < 3 or self._zero.dtype is not torch.float32:
            for index, master in enumerate(self._partitions.masters):
                master.data = move(("master", index), master.data, device)
