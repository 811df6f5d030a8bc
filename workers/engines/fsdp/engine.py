"""Engine `fsdp`: data parallelism with sharded float32 weights, gradients and AdamW (PyTorch's
FSDP2), over tensor parallelism.

ZeRO-2 by default: gathered weights (bf16 under precision=bf16) are kept from the forward to the
backward pass and over the micro-batches of a step. Gradients are reduced in float32: of a small
model, which is one FSDP group, once per step; of a large one layer by layer in every micro-batch,
so that a whole gradient exists of one layer only. reshard_after_forward=True is ZeRO-3: gathered
per micro-batch too. Context parallelism cuts packed rows over ranks that share the weights out as
data ranks do. Pipelines are left out. docs/training.md has the
measurements behind the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import LocalParameter
from workers.config import Precision, TrainConfig
from workers.engines import pipeline_engines
from workers.engines.base import Head, LossFn, Outputs
from workers.engines.fsdp.sharding import (
    ONE_GROUP_BYTES,
    abandon_step,
    check_replicas,
    is_one_group,
    local_part,
    logical_parameters,
    make_mesh,
    shard_model,
)
from workers.engines.fsdp.shared_weights import SharedWeights
from workers.engines.model.context_parallel import check_context_parallel
from workers.engines.model.expert_parallel import check_expert_parallel, expert_mesh
from workers.engines.model.layers import check_layers
from workers.engines.model.loading import ModelSource
from workers.engines.model.routers import check_routers
from workers.engines.model.split_plan import check_fits
from workers.engines.shared.by_length import ByLength
from workers.engines.shared.flat_views import named
from workers.engines.shared.metrics import add_micro_batch, counted_once, metrics_of_group
from workers.engines.shared.micro_batches import (
    MicroBatch,
    counts,
    gather_group_outputs,
    gather_outputs,
    on_device,
    pad_time,
    run_micro_batch,
)
from workers.engines.shared.optimizer import (
    MODEL,
    MOMENTS,
    build_optimizer,
    clip_gradients,
    global_grad_norm,
    learning_rate,
    local_gradients,
    no_moments,
    set_learning_rate,
)
from workers.engines.shared.row_groups import axis_group
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences


class FsdpEngine(ShardedEngine):
    """See TrainingEngine. config.tp and cp give the layout, data ranks are what is left of the pool."""

    trains_adapters = True
    shares_rows = True
    divides_experts = True
    sees_images = True

    @classmethod
    def check(
        cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int
    ) -> None:
        check_layers(model, config)
        check_routers(model, config.router_aux_loss_coefficient)
        if config.pp != 1:
            raise ValueError(
                f"train.pp is {config.pp}, but engine fsdp has no pipeline; set pp=1, or engine to "
                f"one with pipeline stages: {pipeline_engines(with_pipeline=True)}"
            )
        check_context_parallel(model, config)
        check_expert_parallel(model, config, world_size)
        check_replicas(config, world_size)
        if config.tp > 1:
            check_fits(model, config.tp, divides_experts=config.ep > 1)

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        """Parameters lie cut over data ranks between steps under both stages."""
        return replace(
            space,
            max_pipeline=1,
            splits_experts=False,
            splits_latent=False,
            zero_stages=(2, 3),
            cut_between_steps=True,
            whole_up_to_bytes=float(ONE_GROUP_BYTES),
        )

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return 3 if config.reshard_after_forward else 2

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return True

    def _build(self, source: ModelSource, *, trains: bool) -> None:
        del trains  # memory for training is taken by the first step
        replicas = self.config.fsdp_replicas
        self._mesh = make_mesh(self.layout, self.device.type, replicas)
        self._data_group = self._mesh.get_group("dp")
        self._is_copy = False
        """An earlier replica has this rank's shards too."""
        if replicas > 1:
            self._data_group = axis_group(self.layout, "dp", "cp")
            self._is_copy = self._mesh.get_local_rank("replica") > 0
        self._by_length: ByLength | None = None
        if self.config.cp > 1 and self.config.cp_by_length:
            model = source.model.config
            self._by_length = ByLength(self.layout, self.context.rank, model, self.config)
        elif self.config.cp > 1:
            self._data_group = axis_group(self.layout, "dp")
        experts = None
        if self.config.ep > 1:
            experts = expert_mesh(self.layout, self.config.ep, self.device.type)
        lender, lent = self.lender, dict[str, nn.Parameter]()
        if lender is not None:
            assert isinstance(lender, FsdpEngine)
            lent = {n: p for n, p in lender._parameters.items() if not p.requires_grad}
        self._shared: SharedWeights | None = None
        if self.device.type == "cpu" and self._mesh["dp"].size() > 1:
            bf16 = self.config.precision is Precision.bf16
            dtype = torch.bfloat16 if bf16 else torch.float32
            self._shared = SharedWeights(self._mesh.get_group("dp"), dtype)
        self._scored = shard_model(
            source,
            self.head,
            self.config,
            self._mesh,
            experts,
            self.device,
            self.adapter,
            lent,
            self._shared,
        )
        self._routers = self._scored.routers
        self._parameters: dict[str, nn.Parameter] = dict(source.model.named_parameters())
        self._parts = source.parts
        # AdamW works on the rank's own memory: no distributed dispatch per parameter, and any mix
        # of meshes.
        self._local: dict[str, nn.Parameter] = {}
        present = []
        for name, parameter in self._parameters.items():
            local = nn.Parameter(local_part(parameter))
            self._local[name] = local
            if local.numel() and parameter.requires_grad:
                present.append(local)
        self._trained = {
            name: parameter
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        }
        self._optimizer = build_optimizer(present, self.config.optimizer)
        # A small model's gathered weights serve the passes until the next step, and its gradient is
        # added up whole; a large one's would be in the way.
        self._one_group = is_one_group(self._scored)
        self._num_steps = 0

    def forward(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        routes: bool = False,
    ) -> Outputs:
        with torch.no_grad(), self._routers.recording(routes):
            alike = self.config.reshard_after_forward or self.config.ep > 1
            micro_batches = self._micro_batches(sequences, alike=alike)
            outputs = []
            for micro_batch in micro_batches:
                outputs.append(self._run(micro_batch, entropy, temperature))
        if not self._one_group:
            self._reshard()
        if self._shared is not None:
            self._shared.wait()
        if self._by_length is not None:
            assert self._row_group is not None
            result = gather_group_outputs(micro_batches, outputs, sequences, self._row_group)
        else:
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
        with ExitStack() as on_error:
            on_error.callback(self._abandon_step)
            alike = self.config.reshard_after_forward or not self._one_group or self.config.ep > 1
            micro_batches = self._micro_batches(sequences, alike=alike)
            with self._with_routers(sequences) as router_metrics:
                metrics = self._accumulate(micro_batches, loss_fn, entropy, temperature)
            self._sum_over_tensor_ranks()
            grad_norm = global_grad_norm(
                self._gradients(), world_size=self.layout.size, device=self.device
            )
            clip_gradients(self._parameters, grad_norm, self.config.optimizer.clip_grad_norm)
            on_error.pop_all()
        rate = self._update()
        return {
            **metrics_of_group(metrics, self._data_group),
            **router_metrics,
            "grad_norm": float(grad_norm),
            "learning_rate": rate,
        }

    def local_parameters(self) -> list[LocalParameter]:
        # Who writes to the views must not find gathered copies of before.
        self._reshard()
        return logical_parameters(self._parameters, self._parts, self._local, copies=True)

    def _logical(self, tensors: Mapping[str, Tensor], *, copies: bool) -> list[LocalParameter]:
        """The trained parameters."""
        all_shards = copies or self.layout.coordinates(self.context.rank)["tp"] == 0
        parameters = logical_parameters(self._trained, self._parts, tensors, copies=all_shards)
        if self._is_copy and not copies:
            return [replace(parameter, shards=()) for parameter in parameters]
        return parameters

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def state(self, *, moments: bool, copies: bool) -> list[LocalParameter]:
        result = named(MODEL, self._logical(self._local, copies=copies))
        if moments:
            states = {name: self._state(self._local[name]) for name in self._trained}
            for moment in MOMENTS:
                tensors = {name: state[moment] for name, state in states.items()}
                result += named(moment, self._logical(tensors, copies=copies))
        return result

    def restored(self, num_steps: int) -> None:
        self._reshard()
        self._num_steps = num_steps
        for moments in self._optimizer.state.values():
            moments["step"].fill_(num_steps)

    def offload(self) -> None:
        self._reshard()
        super().offload()

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self._scored, FSDPModule)
        return self._scored

    def _run(self, micro_batch: MicroBatch, entropy: bool, temperature: float) -> Outputs:
        return run_micro_batch(self._scored, micro_batch, entropy=entropy, temperature=temperature)

    def _micro_batches(self, sequences: Sequences, *, alike: bool) -> list[MicroBatch]:
        """`alike`: as many on every data rank, because each has collectives."""
        if self._by_length is None:
            return self._share_rows(self._cut_alike(sequences, self._data_group, alike=alike))
        cut = self._by_length.micro_batches(sequences, self.head, self._cutting)
        num_with_rows = len(cut)
        cut = self._fill_up(cut, sequences, self._data_group, alike=alike)
        cut[num_with_rows:] = [pad_time(empty, self.config.tp) for empty in cut[num_with_rows:]]
        return [on_device(micro_batch, self.device) for micro_batch in cut]

    def _accumulate(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, entropy: bool, temperature: float
    ) -> dict[str, Tensor]:
        """Gradients of the summed loss of all micro-batches and data ranks; the metrics of this
        rank."""
        metrics: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            if not self.config.reshard_after_forward:
                last = index == len(micro_batches) - 1
                self._root.set_requires_gradient_sync(last or not self._one_group)
                self._root.set_reshard_after_backward(last)
            loss, parts = loss_fn(
                self._run(micro_batch, entropy, temperature), micro_batch.sequences
            )
            loss.backward()
            if self._by_length is not None:
                loss, parts = counted_once(loss, parts, counts(micro_batch))
            metrics = add_micro_batch(metrics, loss, parts)
        return metrics

    def _sum_over_tensor_ranks(self) -> None:
        """The gradients that each tensor rank has a share of: one collective."""
        shares = []
        for name, parameter in self._parameters.items():
            if self._parts[name].partial:
                shares += local_gradients([parameter])
        if shares:
            flat = torch.cat([share.flatten() for share in shares])
            dist.all_reduce(flat, group=self._mesh.get_group("tp"))
            sums = flat.split([share.numel() for share in shares])
            for share, total in zip(shares, sums, strict=True):
                share.copy_(total.view_as(share))

    def _gradients(self) -> Iterator[tuple[Tensor, int]]:
        """This rank's parts of the gradient, and how many ranks hold the same elements."""
        for name, parameter in self._parameters.items():
            copies = self.config.tp if self._parts[name].replicated else 1
            copies *= self.config.fsdp_replicas
            for gradient in local_gradients([parameter]):
                yield gradient, copies

    def _update(self) -> float:
        """One AdamW step with the gradients there are; the learning rate used."""
        rate = learning_rate(self.config.optimizer, self._num_steps)
        set_learning_rate(self._optimizer, rate)
        for name, parameter in self._parameters.items():
            self._local[name].grad = (
                local_part(parameter.grad) if parameter.grad is not None else None
            )
        with self._state_on_device():
            self._optimizer.step()
        self._num_steps += 1
        self._drop_gradients()
        if self.config.offload_optimizer:
            self.offload()
        return rate

    def _abandon_step(self) -> None:
        abandon_step(self._scored)
        self._drop_gradients()

    def _master_parameters(self) -> list[LocalParameter]:
        return self.local_parameters()

    def _drop_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = self._local[name].grad = None

    def _reshard(self) -> None:
        """Free gathered weights; they would be stale after the shards are written to."""
        for module in self._scored.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _state(self, local: nn.Parameter) -> Mapping[str, Tensor]:
        """AdamW's state of a parameter; zeros before the first step."""
        state = self._optimizer.state
        if not local.numel():
            return no_moments(local)
        if not state[local]:
            state[local] = no_moments(local)
        moments: dict[str, Tensor] = state[local]
        return moments

    def _move_state(self, device: torch.device) -> None:
        for index, moments in enumerate(self._optimizer.state.values()):
            for name, value in moments.items():
                moments[name] = self._host_memory.move((name, index), value, device)
