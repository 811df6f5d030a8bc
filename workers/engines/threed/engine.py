"""Engine `threed`: pipeline x tensor x data parallelism with a ZeRO-1 optimizer, the paper's
Megatron position, in plain PyTorch.

layout.py     which layouts fit; which layers a stage holds
schedule.py   1F1B and interleaved 1F1B as timetables
stages.py     a stage of a Hugging Face model
pipeline.py   runs the timetable: passes and messages of any shape
optimizer.py  flat buffers, gradient sums, AdamW split over data ranks
build.py      a rank's share of the model, filled parameter by parameter

Data ranks need not have equally many micro-batches: they meet only at the end of a step, unless
experts are divided over them. Left out: splitting of single sequences over pipeline time.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import LocalParameter, LocalShard, all_parameters
from workers.config import TrainConfig
from workers.engines.base import Head, LossFn, Outputs
from workers.engines.model.layers import check_layers
from workers.engines.model.loading import ModelSource
from workers.engines.model.routers import check_routers
from workers.engines.shared.flat_views import named
from workers.engines.shared.metrics import add_micro_batch, metrics_of_some
from workers.engines.shared.micro_batches import MicroBatch, gather_outputs, outputs_of
from workers.engines.shared.optimizer import MODEL, MOMENTS
from workers.engines.shared.row_groups import axis_group
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.engines.threed.build import Share, build_share
from workers.engines.threed.frozen import FrozenPart
from workers.engines.threed.layout import check_layout
from workers.engines.threed.optimizer import FlatSlice, ZeroOptimizer
from workers.sequences import Sequences

MICRO_BATCHES_PER_STAGE = 4
"""A pipeline of p ranks gets about 4 p micro-batches where the batch is large enough: a fifth
of the time is idle at most."""
MIN_MICRO_BATCH_TOKENS = 512
"""Smaller micro-batches than this cost more than an idle pipeline."""


class ThreeDEngine(ShardedEngine):
    """See TrainingEngine; config.tp, cp, pp, rank_order, pipeline_schedule and virtual_stages give
    the layout, data ranks are what is left."""

    trains_adapters = True
    shares_rows = True
    divides_experts = True
    sees_images = True

    @classmethod
    def check(
        cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int
    ) -> None:
        check_layers(model, config)
        if config.fsdp_replicas != 1:
            raise ValueError(
                f"train.fsdp_replicas is {config.fsdp_replicas}, which engine threed has not; set it to "
                "1, or engine to fsdp"
            )
        check_routers(model, config.router_aux_loss_coefficient)
        check_layout(model, config, world_size)

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        return replace(space, zero_stages=(1,), splits_experts=False, splits_latent=False)

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return 1

    @classmethod
    def budget_tokens(cls, config: TrainConfig, num_tokens: int) -> int:
        if config.pp == 1:
            return config.micro_batch_tokens
        passes = MICRO_BATCHES_PER_STAGE * config.pp
        share = -(-num_tokens // (passes * config.cp))
        return min(config.micro_batch_tokens, max(share, MIN_MICRO_BATCH_TOKENS))

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return False

    def _build(self, source: ModelSource, *, trains: bool) -> None:
        del trains  # memory for training is taken by the first step
        lender = self.lender
        assert lender is None or isinstance(lender, ThreeDEngine)
        self._place = self.layout.coordinates(self.context.rank)
        images = self._cutting.images
        if images is not None and self._place["pp"]:
            self._cutting = replace(self._cutting, images=images.without_pixels())
        self._share: Share = build_share(
            source,
            self.model,
            self.config,
            self.head,
            self.layout,
            self.context.rank,
            self.device,
            self.adapter,
            lender.frozen_parts if lender is not None else [],
        )
        self._data_group = axis_group(self.layout, "dp") if self.config.ep > 1 else None
        self._routers = self._share.pipeline.stages.scored.routers
        self._optimizer = ZeroOptimizer(self._share.groups, self.config.optimizer, self.device)

    @property
    def frozen_parts(self) -> list[FrozenPart]:
        """This rank's part of the base of its adapter."""
        return self._share.frozen.parts

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses and outputs."""
        return self._place["pp"] == self.config.pp - 1

    def forward(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        routes: bool = False,
    ) -> Outputs | None:
        micro_batches = self._micro_batches(sequences)
        results: list[Outputs] = [Outputs()] * len(micro_batches)

        def finish(index: int, numbers: dict[str, Tensor]) -> Tensor:
            results[index] = outputs_of(numbers, micro_batches[index])
            return next(iter(numbers.values()))

        pipeline = self._share.pipeline
        with self._routers.recording(routes):
            pipeline.run(
                micro_batches, finish, train=False, entropy=entropy, temperature=temperature
            )
        chosen = self._routes(micro_batches, sequences, pipeline.group) if routes else None
        if not self.is_last_stage:
            return Outputs(routes=chosen) if routes else None
        result = _nothing(self.head, entropy)
        if micro_batches:
            result = gather_outputs(micro_batches, results, sequences)
        return replace(result, routes=chosen)

    def train_step(
        self,
        sequences: Sequences,
        loss_fn: LossFn,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        micro_batches = self._micro_batches(sequences)
        metrics: dict[str, Tensor] = {}

        def finish(index: int, numbers: dict[str, Tensor]) -> Tensor:
            micro_batch = micro_batches[index]
            loss, parts = loss_fn(outputs_of(numbers, micro_batch), micro_batch.sequences)
            metrics.update(add_micro_batch(metrics, loss, parts))
            return loss

        self._optimizer.begin_step(len(micro_batches))
        with self._with_routers(sequences) as router_metrics:
            self._share.pipeline.run(
                micro_batches, finish, train=True, entropy=entropy, temperature=temperature
            )
        with self._state_on_device():
            grad_norm, rate = self._optimizer.step()
        # Of the ranks that hold the same losses one counts.
        counts = self.is_last_stage and self._place["tp"] == self._place["cp"] == 0
        combined = metrics_of_some(metrics if counts else {})
        return {**combined, **router_metrics, "grad_norm": grad_norm, "learning_rate": rate}

    def local_parameters(self) -> list[LocalParameter]:
        shards: dict[str, list[LocalShard]] = {}
        for group in self._share.groups:
            for piece, view in zip(group.pieces, group.views(group.weights), strict=True):
                shards.setdefault(piece.name, []).append(LocalShard(piece.box, view))
        for part in self.frozen_parts:
            shards.setdefault(part.piece.name, []).append(LocalShard(part.piece.box, part.tensor))
        return all_parameters(self._share.logical, shards, self._share.pipeline.dtype)

    @property
    def num_steps(self) -> int:
        return self._optimizer.num_steps

    def state(self, *, moments: bool, copies: bool) -> list[LocalParameter]:
        parts = [group.master for group in self._share.groups]
        result = named(MODEL, self._in_boxes(parts, copies=copies))
        if moments:
            adam = self._optimizer.states()
            for moment in MOMENTS:
                parts = [adam.state[group.master][moment] for group in self._share.groups]
                result += named(moment, self._in_boxes(parts, copies=copies))
        return result

    def restored(self, num_steps: int) -> None:
        self._optimizer.restored(num_steps)

    def _master_parameters(self) -> list[LocalParameter]:
        return self._in_boxes([group.master for group in self._share.groups], copies=True)

    def _in_boxes(self, parts: list[Tensor], *, copies: bool) -> list[LocalParameter]:
        """The data rank's parts of the trained groups as boxes of every trained parameter;
        views."""
        shards: dict[str, list[LocalShard]] = {}
        for group, part in zip(self._share.groups, parts, strict=True):
            for index, piece in enumerate(group.pieces):
                if copies or self._writes(piece):
                    boxes = starmap(LocalShard, group.boxes(index, part.detach()))
                    shards.setdefault(piece.name, []).extend(boxes)
        return all_parameters(self._share.trained_shapes, shards, torch.float32)

    def _writes(self, piece: FlatSlice) -> bool:
        """Whether no earlier rank has the same elements."""
        first_tensor_rank = self._place["tp"] == 0 or not piece.replicated
        return first_tensor_rank and (self._place["pp"] == 0 or not piece.tied)

    def _drop_gradients(self) -> None:
        self._optimizer.free_gradients()

    def _move_state(self, device: torch.device) -> None:
        self._optimizer.move(device, self._host_memory)

    def _micro_batches(self, sequences: Sequences) -> list[MicroBatch]:
        """The same on all ranks of this data coordinate; none if there are no rows and experts are
        not divided."""
        cut = self._cut(sequences, self.budget_tokens(self.config, int(sequences.lengths.sum())))
        if self.config.ep > 1:
            cut = self._fill_up(cut, sequences, self._data_group, alike=True)
        return self._share_rows(cut)


def _nothing(head: Head, entropy: bool) -> Outputs:
    """The outputs of no rows."""
    empty = torch.zeros(0)
    if head is Head.lm:
        return Outputs(log_probs=empty, entropy=empty if entropy else None)
    return Outputs(values=empty) if head is Head.value else Outputs(scores=empty)
