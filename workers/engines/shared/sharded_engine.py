"""ShardedEngine: what engines have in common that spread one model over the ranks of a pool."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hybridflow.context import RankContext
from hybridflow.resharding.shards import LocalParameter
from hybridflow.snapshots.files import file_name, write_snapshot
from hybridflow.snapshots.reading import SnapshotFiles
from workers.config import ContextExchange, ModelConfig, TrainConfig, VisionTraining
from workers.engines.base import Head, TrainingEngine, WeightSource
from workers.engines.model.attention import check_shares_rows
from workers.engines.model.context_parallel import exchange_of
from workers.engines.model.conversion import as_stored
from workers.engines.model.loading import (
    ModelSource,
    build_on_meta,
    model_config,
    saved_dtype,
    stored_buffers,
)
from workers.engines.model.lora import Adapter, attach
from workers.engines.model.peft_files import write_adapter
from workers.engines.model.routers import Load, Routers, experts_per_token
from workers.engines.model.tower import freeze_tower
from workers.engines.model.vision import ImageInputs
from workers.engines.shared.export import write_code, write_configs, write_safetensors
from workers.engines.shared.gather import gather_objects
from workers.engines.shared.host_memory import HostMemory
from workers.engines.shared.merging import (
    MergedWeights,
    ScaledMatrices,
    TransientWeights,
    base_digest,
    gather_whole,
)
from workers.engines.shared.micro_batches import (
    MicroBatch,
    chosen_tokens,
    cutting_of,
    empty_micro_batch,
    make_micro_batches,
    on_device,
    pad_time,
    route_part,
    share_row,
)
from workers.engines.shared.optimizer import MODEL, check_optimizer_config
from workers.engines.shared.row_groups import axis_group
from workers.images import family_of
from workers.precision import with_native_precision
from workers.sequences import Sequences

BASE = "base_digest"
"""The scalar of an adapter's snapshot that says which weights it belongs to."""
SAME_WEIGHTS = ("path", "revision", "trust_remote_code", "attention")
"""Settings of two models that have the same weights and compute alike with them."""
SAME_NUMBERS = (
    "engine",
    "tp",
    "pp",
    "cp",
    "cp_exchange",
    "ep",
    "fsdp_replicas",
    "rank_order",
    "precision",
)
"""Settings of two engines that compute alike, in the same layout."""
CHECKPOINT_BYTES = 12
"""Bytes of a parameter in a checkpoint: float32 weights and AdamW's two moments."""


class ShardedEngine(TrainingEngine):
    """Settings checked, the model loaded, weights exported, optimizer states moved to the host and
    back.

    A subclass builds its model and optimizer in _build, and says where its master weights are and
    how its optimizer moves. What is left of TrainingEngine is its own: the passes, the step, the
    shard map, checkpoints.
    """

    lends = True
    _routers: Routers
    """Those of the model that computes; set by _build."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        config: TrainConfig,
        head: Head,
        context: RankContext,
        trains: bool = True,
        seed: int = 0,
        lender: TrainingEngine | None = None,
    ) -> None:
        config = with_native_precision(config, context.device)
        published = model_config(model, head)
        self.check(published, config, head, context.world_size)
        check_optimizer_config(config.optimizer)
        self.layout = self.make_layout(config, context.world_size)
        tokens = chosen_tokens(config, published, context.device)
        config = replace(config, micro_batch_tokens=tokens)
        self.model, self.config, self.head, self.context = model, config, head, context
        self.device = torch.device(context.device)
        self.lender = lender
        source = ModelSource(model, head, context, seed)
        self.adapter: Adapter | None = None
        if config.vision is VisionTraining.frozen:
            freeze_tower(source.model)
        if config.lora.enabled:
            self.adapter = attach(source, config.lora, head, seed)
        trained = set[str]()
        for name, parameter in source.model.named_parameters():
            if parameter.requires_grad:
                trained.add(name)
        self._hf_config = copy.deepcopy(source.model.config)
        self._hf_config.architectures = [type(source.model).__name__]
        self._hf_config.dtype = self._saved_dtype = saved_dtype(model, published)
        self._generation_config = source.generation_config
        self._cutting = cutting_of(config, source.model)
        if family_of(published) is not None:
            self._cutting = replace(self._cutting, images=ImageInputs(model))
        self._row_group: ProcessGroup | None = None
        """The ranks that share this rank's rows, under context parallelism."""
        self._exchange = ContextExchange.ulysses
        self._tensor_group: ProcessGroup | None = None
        """The tensor ranks, of which each routes its part of the tokens."""
        if config.tp > 1 and self._cutting.has_routers:
            self._tensor_group = axis_group(self.layout, "tp")
        if config.cp > 1:
            check_shares_rows(source.model, config.cp)
            self._row_group = axis_group(self.layout, "cp")
            self._exchange = exchange_of(published, config)
        self._state_on_host = False
        self._host_memory = HostMemory()
        self._build(source, trains=trains)
        self.lender = None  # it may go before this engine does
        self._buffers = [
            LocalParameter.whole(name, buffer)
            for name, buffer in stored_buffers(source.model).items()
        ]
        self._base_digest = 0
        if self.adapter is not None:
            self._base_digest = base_digest(self.local_parameters(), trained)
        if config.offload_optimizer:
            self.offload()

    @abstractmethod
    def _build(self, source: ModelSource, *, trains: bool) -> None:
        """This rank's part of the model, and the optimizer; collective. Frozen weights that
        self.lender has too, with the same values, are its memory."""

    @abstractmethod
    def _master_parameters(self) -> list[LocalParameter]:
        """This rank's float32 weights, where the model is; called within _state_on_device."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Free what gradients take."""

    @abstractmethod
    def _move_state(self, device: torch.device) -> None:
        """Move the optimizer's states, and master weights that are not the working ones, through
        the engine's host memory."""

    def weight_source(self, *, adapter: bool = False) -> WeightSource:
        if self.adapter is None:
            return WeightSource(parameters=self.local_parameters() + self._buffers)
        held = self.local_parameters()
        transient: TransientWeights = MergedWeights(held, self.adapter, self._gathered_trained)
        buffers = self._buffers
        if adapter:
            transient, buffers = ScaledMatrices(held, self.adapter), []
        return WeightSource(
            parameters=transient.parameters + buffers,
            transient=transient.names,
            latest=transient.filled,
        )

    def has_base(self, model: ModelConfig, config: TrainConfig) -> bool:
        if self.adapter is None or self.head is not Head.lm or config.lora.enabled:
            return False
        return self._has_same_base(model, config)

    def lends_base(self, model: ModelConfig, config: TrainConfig) -> bool:
        if self.adapter is None or not config.lora.enabled or not self.lends:
            return False
        return self._has_same_base(model, config)

    def _has_same_base(self, model: ModelConfig, config: TrainConfig) -> bool:
        config = with_native_precision(config, self.context.device)
        same_model = all(vars(model)[name] == vars(self.model)[name] for name in SAME_WEIGHTS)
        return same_model and all(
            vars(config)[name] == vars(self.config)[name] for name in SAME_NUMBERS
        )

    @contextmanager
    def base_only(self) -> Iterator[None]:
        if self.adapter is None:
            yield
            return
        with torch.no_grad(), self.adapter.switched_off():
            yield

    @contextmanager
    def _with_routers(self, sequences: Sequences, scale: float = 1.0) -> Iterator[dict[str, float]]:
        """Around the forward and backward passes of a step on `sequences`, which have `scale` times
        the auxiliary loss. Yields what becomes, with the end of the body, the metrics of the
        routers; none where the model has no experts. Collective."""
        metrics: dict[str, float] = {}
        if not len(self._routers):
            yield metrics
            return
        coefficient = self.config.router_aux_loss_coefficient
        with ExitStack() as stack:
            if coefficient:
                load = self._count_load(sequences)
                stack.enter_context(self._routers.balanced(load, coefficient, scale))
            count = stack.enter_context(self._routers.counting(self.device))
            yield metrics
        load = count.summed()
        metrics |= load.metrics()
        if sequences.routes is not None:
            metrics |= load.replay_metrics()
        if coefficient:
            metrics["router/aux_loss"] = load.loss(coefficient)

    def _routes(
        self,
        micro_batches: list[MicroBatch],
        sequences: Sequences,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Outputs.routes of passes that were recorded; `group`: the ranks that ran other layers of
        the same passes."""
        per_token = experts_per_token(self._hf_config)
        shape = (len(sequences.token_ids), len(self._routers), per_token)
        routes = torch.full(shape, -1, dtype=torch.int16)
        starts = torch.cumsum(sequences.lengths, 0) - sequences.lengths
        for micro_batch in micro_batches:
            routing = micro_batch.routing
            assert routing is not None, "the model has no routers"
            places = starts[micro_batch.rows[routing.rows]] + routing.columns
            routes[places] = routing.recorded(len(self._routers), per_token).cpu()
        for ranks in (group, self._row_group, self._tensor_group):
            if ranks is not None and ranks.size() > 1:
                merged = routes.to(self.device, torch.int32)
                dist.all_reduce(merged, op=dist.ReduceOp.MAX, group=ranks)
                routes = merged.to("cpu", torch.int16)
        return routes

    def _count_load(self, sequences: Sequences) -> Load:
        """The load of the experts by the rows of all ranks. Collective."""
        with self._routers.counting(self.device) as count:
            self.forward(sequences)
        return count.summed()

    def _gathered_trained(self) -> dict[str, Tensor]:
        """Every trained parameter, whole on every rank, where there is an adapter: they are
        small. Collective."""
        with self._state_on_device():
            whole = gather_whole(self.state(moments=False, copies=False), self.device)
        return {name.removeprefix(f"{MODEL}."): tensor for name, tensor in whole.items()}

    def save_pretrained(self, directory: Path) -> None:
        if self.adapter is not None:
            self._save_adapter(directory)
            return
        with self._state_on_device():
            write_safetensors(
                self._master_parameters() + self._buffers,
                directory,
                dtype=self._saved_dtype,
                as_stored=partial(as_stored, build_on_meta(self.model, self.head)),
                begin=partial(self._write_configs, directory),
            )

    def _save_adapter(self, directory: Path) -> None:
        assert self.adapter is not None
        tensors = self._gathered_trained()
        if self.context.rank == 0:
            write_adapter(
                directory,
                {name: tensor.cpu() for name, tensor in tensors.items()},
                self.adapter.config,
                self.adapter.layers,
                self.model,
                task="CAUSAL_LM" if self.head is Head.lm else "SEQ_CLS",
            )
        if self.context.world_size > 1:
            dist.barrier()

    def save(self, directory: Path, scalars: Mapping[str, int] | None = None) -> None:
        state = self.state(moments=self.num_steps > 0, copies=False)
        write_snapshot(directory / file_name(self.context.rank), state, self.scalars(scalars))

    def scalars(self, further: Mapping[str, int] | None = None) -> dict[str, int]:
        result = super().scalars(further)
        if self.adapter is not None:
            result[BASE] = self._base_digest
        return result

    def load(self, directory: Path, stamp: str | None = None) -> dict[str, int]:
        scalars: dict[str, int] = {}
        damage = ""
        with self._state_on_device():
            try:
                scalars = self._fill(SnapshotFiles(directory, stamp))
            except ValueError as error:
                damage = str(error)
            # What follows is collective: all ranks go on, or none.
            damages = [text for text in gather_objects(damage) if text]
            if damages:
                raise ValueError(damage or damages[0])
            self.restored(scalars["num_steps"])
        return scalars

    def _fill(self, files: SnapshotFiles) -> dict[str, int]:
        """Overwrites this rank's part of weights and moments."""
        if self.adapter is not None and files.scalars.get(BASE) != self._base_digest:
            raise ValueError(
                f"snapshot {files.directory}: its adapter was trained on other weights than those of "
                f"model.path={self.model.path!r}; use the model that the run began with"
            )
        # A snapshot of before the first step has no moments: they are zero.
        saved = files.scalars["num_steps"] > 0
        stored, zero = [], []
        for parameter in self.state(moments=saved or self.num_steps > 0, copies=True):
            if saved or parameter.name.startswith(f"{MODEL}."):
                stored.append(parameter)
            else:
                zero += [shard.tensor for shard in parameter.shards]
        files.load(stored)
        for tensor in zero:
            tensor.detach().zero_()
        return files.scalars

    def try_saving(self, directory: Path) -> int:
        if self.adapter is None:
            self._write_configs(directory)
            write_safetensors([], directory, dtype=self._saved_dtype)
        else:
            self._save_adapter(directory)
        write_snapshot(directory / file_name(self.context.rank), [], {})
        trained = self.state(moments=False, copies=False)
        numbers = sum(math.prod(parameter.shape) for parameter in trained)
        return numbers * (CHECKPOINT_BYTES + self._saved_dtype.itemsize)

    def _write_configs(self, directory: Path) -> None:
        """The configuration and that of generation, as they came with the model."""
        if self.context.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            if self.model.trust_remote_code:
                write_code(build_on_meta(self.model, self.head), self._hf_config, directory)
            write_configs(self._hf_config, self._generation_config, directory)

    def offload(self) -> None:
        self._drop_gradients()
        self._move_state(torch.device("cpu"))
        self._host_memory.finish()
        self._state_on_host = True

    def onload(self) -> None:
        self._move_state(self.device)
        self._state_on_host = False

    @contextmanager
    def _state_on_device(self) -> Iterator[None]:
        """Within, what offload moved is where the model is; afterwards where it was before."""
        was_on_host = self._state_on_host
        if was_on_host:
            self.onload()
        yield
        if was_on_host:
            self.offload()

    def _cut(self, sequences: Sequences, budget_tokens: int) -> list[MicroBatch]:
        """Micro-batches of at most `budget_tokens` tokens a rank; none if there are no rows."""
        cutting = replace(self._cutting, budget_tokens=budget_tokens * self.config.cp)
        return make_micro_batches(sequences, self.head, cutting)

    def _cut_alike(
        self, sequences: Sequences, group: ProcessGroup | None, *, alike: bool
    ) -> list[MicroBatch]:
        """At least one micro-batch; if `alike`, as many on every rank of `group` (None: all),
        some of them empty, for passes with collectives inside."""
        cut = self._cut(sequences, self.config.micro_batch_tokens)
        return self._fill_up(cut, sequences, group, alike=alike)

    def _fill_up(
        self,
        micro_batches: list[MicroBatch],
        sequences: Sequences,
        group: ProcessGroup | None,
        *,
        alike: bool,
    ) -> list[MicroBatch]:
        """The micro-batches and empty ones, as _cut_alike says."""
        count = max(1, len(micro_batches))
        if alike and dist.get_world_size(group) > 1:
            largest = torch.tensor(count, device=self.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            count = int(largest)
        while len(micro_batches) < count:
            micro_batches.append(empty_micro_batch(sequences, self.head, self._cutting))
        return micro_batches

    def _share_rows(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's parts of the micro-batches, with a time that tp divides, on its device."""
        group, tp = self._row_group, self.config.tp
        shared = []
        for micro_batch in micro_batches:
            if group is None:
                part = pad_time(micro_batch, tp)
            else:
                part = share_row(micro_batch, group, self._exchange, tp)
            if self._tensor_group is not None:
                part = route_part(part, self._tensor_group)
            shared.append(on_device(part, self.device))
        return shared
