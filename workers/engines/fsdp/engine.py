"""Engine `fsdp`: data parallelism with sharded float32 weights, gradients and AdamW (PyTorch's FSDP2), over
tensor parallelism.

ZeRO-2 by default: gathered weights (bf16 under precision=bf16) are kept from the forward to the backward
pass, gradients of all micro-batches are added up in float32 and reduced once per step.
reshard_after_forward=True is ZeRO-3: gathered and reduced per micro-batch. Pipelines and context parallelism
are left out. docs/training.md has the measurements behind the choices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import LocalParameter
from workers.config import ModelConfig, TrainConfig
from workers.engines.base import Head, LossFn, Outputs, TrainingEngine
from workers.engines.fsdp.sharding import (
    abandon_step,
    is_one_group,
    local_parameter,
    local_part,
    make_mesh,
    shard_model,
)
from workers.engines.model.loading import ModelSource, model_config
from workers.engines.model.tensor_parallel import check_fits, pad_time
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.shared.export import write_safetensors
from workers.engines.shared.micro_batches import (
    MicroBatch,
    empty_micro_batch,
    gather_outputs,
    make_micro_batches,
)
from workers.engines.shared.optimizer import (
    build_optimizer,
    clip_gradients,
    global_grad_norm,
    learning_rate,
    set_learning_rate,
)
from workers.losses.reduction import combine_metrics
from workers.sequences import Sequences

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, beside the step."""


class FsdpEngine(TrainingEngine):
    """See TrainingEngine. config.tp gives the layout, data ranks are what is left of the pool."""

    @classmethod
    def check(cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int) -> None:
        if config.pp != 1:
            raise ValueError(
                f"train.pp is {config.pp}, but engine fsdp has no pipeline; set pp=1 or engine=threed"
            )
        if config.tp > 1:
            check_fits(model, config.tp)

    @classmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        """Parameters lie cut over data ranks between steps under both stages."""
        return replace(space, max_pipeline=1, zero_stages=(2, 3), cut_between_steps=True)

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return 3 if config.reshard_after_forward else 2

    @classmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        return True

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
        self.check(model_config(model, head), config, head, context.world_size)
        self.layout = self.make_layout(config, context.world_size)
        self.config, self.head, self.context = config, head, context
        self.device = torch.device(context.device)
        self._mesh = make_mesh(self.layout, self.device.type)
        self._data_group = self._mesh.get_group("dp")
        source = ModelSource(model, head, context, seed)
        self._hf_config, self._generation_config = (
            copy.deepcopy(source.model.config),
            source.generation_config,
        )
        self._hf_config.architectures = [type(source.model).__name__]
        self._scored = shard_model(source, head, config, self._mesh, self.device)
        self._parameters: dict[str, nn.Parameter] = dict(source.model.named_parameters())
        # AdamW works on the rank's own memory: no distributed dispatch per parameter, and any mix of meshes.
        self._local = {
            name: nn.Parameter(local_part(parameter)) for name, parameter in self._parameters.items()
        }
        self._optimizer = build_optimizer(
            [parameter for parameter in self._local.values() if parameter.numel()], config.optimizer
        )
        # A small model's gathered weights serve the passes until the next step; a large one's would be in
        # generation's way.
        self._keeps_gathered = is_one_group(self._scored)
        self._num_steps = 0
        self._state_on_host = False

    def forward(self, sequences: Sequences, *, entropy: bool = False, temperature: float = 1.0) -> Outputs:
        with torch.no_grad():
            micro_batches = self._micro_batches(sequences)
            outputs = [self._run(micro_batch, entropy, temperature) for micro_batch in micro_batches]
        if not self._keeps_gathered:
            self._reshard()
        return gather_outputs(micro_batches, outputs, sequences)

    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, *, entropy: bool = False, temperature: float = 1.0
    ) -> dict[str, float]:
        finished = False
        try:
            metrics = self._accumulate(self._micro_batches(sequences), loss_fn, entropy, temperature)
            grad_norm = global_grad_norm(self._parameters.values(), world_size=self.layout.size)
            clip_gradients(self._parameters, grad_norm, self.config.optimizer.clip_grad_norm)
            finished = True
        finally:
            if not finished:
                abandon_step(self._scored)
                self._drop_gradients()
        rate = self._update()
        return {**self._over_data_ranks(metrics), "grad_norm": float(grad_norm), "learning_rate": rate}

    def local_parameters(self) -> list[LocalParameter]:
        # Who writes to the views must not find gathered copies of before.
        self._reshard()
        return [local_parameter(name, parameter) for name, parameter in self._parameters.items()]

    def save(self, directory: Path) -> None:
        with self._state_on_device():
            save_tensors(self._checkpoint(), directory)

    def load(self, directory: Path) -> None:
        self._reshard()
        with self._state_on_device():
            state = self._checkpoint()
            load_tensors(state, directory)
            self._num_steps = int(state["num_steps"])
            for moments in self._optimizer.state.values():
                moments["step"].fill_(self._num_steps)

    def save_pretrained(self, directory: Path) -> None:
        if self.context.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._hf_config.dtype = torch.float32
            self._hf_config.save_pretrained(directory)
            if self._generation_config is not None:
                self._generation_config.save_pretrained(directory)
        write_safetensors(self.local_parameters(), directory, self.device)

    def offload(self) -> None:
        self._reshard()
        self._drop_gradients()
        self._move_state(torch.device("cpu"))
        self._state_on_host = True

    def onload(self) -> None:
        self._move_state(self.device)
        self._state_on_host = False

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self._scored, FSDPModule)
        return self._scored

    def _run(self, micro_batch: MicroBatch, entropy: bool, temperature: float) -> Outputs:
        ids, reads, targets, packing = (
            micro_batch.input_ids,
            micro_batch.read_positions,
            micro_batch.targets,
            micro_batch.packing,
        )
        return Outputs(
            **self._scored(ids, reads, targets, packing=packing, entropy=entropy, temperature=temperature)
        )

    def _micro_batches(self, sequences: Sequences) -> list[MicroBatch]:
        """At least one; as many on every data rank if the weights are gathered for each."""
        packing = self.config.packing
        made = make_micro_batches(
            sequences, self.head, self.config.micro_batch_tokens, self.device, packing=packing
        )
        wanted = max(1, len(made))
        if self.config.reshard_after_forward and self.layout.axis_size("dp") > 1:
            most = torch.tensor(wanted, device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._data_group)
            wanted = int(most)
        made += [
            empty_micro_batch(sequences, self.head, self.device, packing=packing)
            for _ in range(wanted - len(made))
        ]
        return [pad_time(micro_batch, self.config.tp) for micro_batch in made]

    def _accumulate(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, entropy: bool, temperature: float
    ) -> dict[str, Tensor]:
        """Gradients of the summed loss of all micro-batches and data ranks; the metrics of this rank."""
        metrics: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            if not self.config.reshard_after_forward:
                last = index == len(micro_batches) - 1
                self._root.set_requires_gradient_sync(last)
                self._root.set_reshard_after_backward(last)
            loss, parts = loss_fn(self._run(micro_batch, entropy, temperature), micro_batch.sequences)
            loss.backward()
            parts = {"loss": loss, **parts}
            metrics = combine_metrics(
                metrics, {name: value.detach().double() for name, value in parts.items()}
            )
        return metrics

    def _update(self) -> float:
        """One AdamW step with the gradients there are; the learning rate used."""
        rate = learning_rate(self.config.optimizer, self._num_steps)
        set_learning_rate(self._optimizer, rate)
        for name, parameter in self._parameters.items():
            self._local[name].grad = local_part(parameter.grad) if parameter.grad is not None else None
        with self._state_on_device():
            self._optimizer.step()
        self._num_steps += 1
        self._drop_gradients()
        if self.config.offload_optimizer:
            self.offload()
        return rate

    def _drop_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = self._local[name].grad = None

    def _reshard(self) -> None:
        """Free gathered weights; they would be stale after the shards are written to."""
        for module in self._scored.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _over_data_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of all data ranks together, combined in rank order on every rank; one small collective."""
        names = sorted(metrics)
        own = torch.stack([metrics[name] for name in names])
        every = own.new_empty(self.layout.axis_size("dp") * len(names))
        dist.all_gather_single(every, own, group=self._data_group)
        total: dict[str, Tensor] = {}
        for numbers in every.cpu().view(-1, len(names)):
            total = combine_metrics(total, dict(zip(names, numbers, strict=True)))
        return {name: float(total[name]) for name in metrics}

    def _checkpoint(self) -> dict[str, Tensor]:
        """Weights, AdamW's moments (zero before the first step) and the step, as distributed tensors over
        this rank's memory."""
        tensors: dict[str, Tensor] = {"num_steps": torch.tensor(self._num_steps)}
        for name, parameter in self._parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            state = self._state(self._local[name])
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = _like(state[moment], parameter)
        return tensors

    def _state(self, local: nn.Parameter) -> Mapping[str, Tensor]:
        state = self._optimizer.state
        if not local.numel():
            return {moment: torch.zeros_like(local) for moment in MOMENTS}
        if not state[local]:
            step = torch.zeros((), dtype=torch.float32, device=local.device)
            state[local] = {"step": step, **{moment: torch.zeros_like(local) for moment in MOMENTS}}
        found: dict[str, Tensor] = state[local]
        return found

    @contextmanager
    def _state_on_device(self) -> Iterator[None]:
        """Within, AdamW's moments are where the weights are, wherever offload has put them."""
        if self._state_on_host:
            self._move_state(self.device)
        yield
        if self._state_on_host:
            self._move_state(torch.device("cpu"))

    def _move_state(self, device: torch.device) -> None:
        for moments in self._optimizer.state.values():
            for name, value in moments.items():
                moments[name] = value.to(device)


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """`local` as a distributed tensor laid out like `parameter`."""
    local = local.detach()
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
