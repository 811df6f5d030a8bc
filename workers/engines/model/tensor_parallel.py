"""Tensor parallelism, with sequence-parallel norms, for any Hugging Face decoder that brings its
own tensor-parallel plan.

    scored = ScoredModel(model, Head.lm)
    parallelize(model, mesh["tp"])      # once, before fully_shard; parameters become DTensors on that mesh
    scored.split_vocabulary(mesh.get_group("tp"))       # log-probs from every rank's part of the vocabulary
    micro_batch = pad_time(micro_batch, tp)             # time must divide by tp
    scored(micro_batch.input_ids, ...)                  # the same numbers on every tensor rank

Which linears split by rows and which by columns is read from transformers' own
`base_model_tp_plan`; there is no table of models here. Between attention and MLP the activations
are split along time; the inputs of attention and MLP are gathered, their outputs reduce-scattered.
All gradients of replicated parameters (norms, biases of row-parallel layers) are Partial over the
tensor ranks: FSDP2 reduces them by itself, engine `threed` reduces all of them at once per step.
The head of a critic or reward model stays a plain parameter: every tensor rank computes all of it
from the same hidden states and has its whole gradient. Parameters are stored as DTensors but
computed on as local tensors: DTensor's dispatch costs more than a small kernel. Left out: experts
(mixture-of-experts plans raise a ValueError) and key-value heads that are replicated over tensor
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import PretrainedConfig, PreTrainedModel

from workers.engines.model.scored import decoder_layers

COLUMN, ROW, REPLICATED = "colwise", "rowwise", ("replicated_with_grad_allreduce", "replicated")
"""The entries of transformers' plans that are understood."""


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard `model` (a causal LM or a sequence classifier, whole or a pipeline stage of one) over
    the one-dimensional `mesh`, in place.

    Every rank must hold the same full weights, or weights on the meta device; nothing is sent. A
    mesh of one rank changes nothing. ValueError if the model has no plan or does not fit.
    """
    if mesh.size() == 1:
        return
    check_fits(model.config, mesh.size())
    if "norm" not in dict(model.base_model.named_children()):
        raise ValueError(
            f"tp={mesh.size()}: the decoder of {model.config.model_type} has no final module "
            "named norm; use tp=1"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    parallelize_module(model, mesh, _styles(model))
    if tied:
        head.weight = model.get_input_embeddings().weight
    group = mesh.get_group()
    for module in _gathering_modules(model):
        module.register_forward_pre_hook(_gather_input(group), with_kwargs=True)
    first = decoder_layers(model)[0]
    if any(True for _ in first.parameters()):
        first.register_forward_pre_hook(
            lambda _, args: (_SliceTime.apply(args[0], group), *args[1:])
        )
    gather = _GatherTimeOnce if head is None else _GatherTime
    model.base_model.get_submodule("norm").register_forward_hook(
        lambda _, args, output: gather.apply(output, group)
    )


def check_fits(config: PretrainedConfig, tp: int) -> None:
    """ValueError that lists the tensor-parallel sizes which fit, if `tp` does not."""
    sizes = fitting_sizes(config)
    if tp in sizes:
        return
    if not config.base_model_tp_plan:
        raise ValueError(
            f"tp={tp}: transformers has no tensor-parallel plan for {config.model_type}; use tp=1"
        )
    counts = ", ".join(f"{name} {count}" for name, count in _counts(config).items())
    raise ValueError(
        f"tp={tp} does not fit {config.model_type}: it must divide {counts}; sizes that fit: "
        f"{', '.join(map(str, sizes))}"
    )


def fitting_sizes(config: PretrainedConfig) -> list[int]:
    """Tensor-parallel sizes that fit the model, ascending; only 1 for a model without a plan."""
    if not config.base_model_tp_plan:
        return [1]
    counts = _counts(config).values()
    return [
        size for size in range(1, min(counts) + 1) if all(count % size == 0 for count in counts)
    ]


def _counts(config: PretrainedConfig) -> dict[str, int]:
    """Counts that are split over tensor ranks, by their names in the configuration."""
    settings = config.to_dict()
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    return {name: settings[name] for name in names if isinstance(settings.get(name), int)}


def local(parameter: Tensor) -> Tensor:
    """The rank's part of a parameter, for computing; a replicated one collects Partial
    gradients."""
    if not isinstance(parameter, DTensor):
        return parameter
    placements: list[Placement] = []
    for placement in parameter.placements:
        placements.append(Partial() if placement.is_replicate() else placement)
    return parameter.to_local(grad_placements=placements)


# Styles: how one module's parameters are laid out and its forward runs on the local part.


class _Style(ParallelStyle):
    """Places the parameters of one module by name and wraps its forward."""

    placements: dict[str, Shard] = {}  # noqa: RUF012

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = self.placements.get(name, Replicate())
            sharded = distribute_tensor(
                parameter.detach(), device_mesh, [placement], src_data_rank=None
            )
            setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        module.forward = self.wrap(module, module.forward, device_mesh.get_group())  # type: ignore[method-assign]
        return module

    def wrap(
        self, module: nn.Module, forward: Callable[..., Any], group: ProcessGroup
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _local_parameters(module):
                return forward(*args, **kwargs)

        return run


class _Column(_Style):
    """Output features split; the input is whole on every rank."""

    placements = {"weight": Shard(0), "bias": Shard(0)}  # noqa: RUF012


class _Row(_Style):
    """Input features split; the output is summed over ranks and split along time; the bias is
    added once, after the sum."""

    placements = {"weight": Shard(1)}  # noqa: RUF012

    def wrap(
        self,
        module: nn.Linear,  # type: ignore[override]
        forward: Callable[..., Any],
        group: ProcessGroup,
    ) -> Callable[..., Any]:
        def run(hidden: Tensor) -> Tensor:
            output = _ScatterTime.apply(F.linear(hidden, local(module.weight)), group)
            return output if module.bias is None else output + local(module.bias)

        return run


class _Embedding(_Style):
    """Rows of the vocabulary split; a token's row comes from the rank that has it."""

    placements = {"weight": Shard(0)}  # noqa: RUF012

    def wrap(  # type: ignore[override]
        self, module: nn.Embedding, forward: Callable[..., Any], group: ProcessGroup
    ) -> Callable[..., Any]:
        size = module.num_embeddings // group.size()
        start = group.rank() * size
        if module.padding_idx is not None:  # its row gets no gradient, on the rank that has it
            module.padding_idx = (
                module.padding_idx - start if start <= module.padding_idx < start + size else None
            )

        def run(input_ids: Tensor) -> Tensor:
            outside = (input_ids < start) | (input_ids >= start + size)
            with _local_parameters(module):
                rows = forward((input_ids - start).masked_fill(outside, 0))
            return _SumRanks.apply(rows.masked_fill(outside[..., None], 0.0), group)

        return run


def _styles(model: PreTrainedModel) -> dict[str, ParallelStyle]:
    """Style of every module that has parameters of its own, by name."""
    plan = _plan(model)
    styles: dict[str, ParallelStyle] = {}
    prefix = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        entry = next(
            (
                style
                for pattern, style in plan.items()
                if fnmatch(name.removeprefix(prefix), pattern)
            ),
            None,
        )
        if module is model.get_input_embeddings():
            styles[name] = _Embedding()
        elif module is model.get_output_embeddings():
            styles[name] = _Column()
        elif not name.startswith(prefix):
            continue  # a value head: whole on every rank
        elif entry == COLUMN:
            styles[name] = _Column()
        elif entry == ROW:
            styles[name] = _Row()
        elif entry in REPLICATED or (
            entry is None and not isinstance(module, nn.Linear | nn.Embedding)
        ):
            styles[name] = _Style()
        else:
            raise ValueError(
                f"tp: {name} of {model.config.model_type} has the plan {entry!r}, which is not "
                "supported; use tp=1"
            )
    return styles


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Module name pattern, from the base model on -> style."""
    return dict(model.config.base_model_tp_plan or {})


def _gathering_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules inside the layers that hold column-parallel linears: attention and MLP."""
    patterns = {
        pattern.rpartition(".")[0] for pattern, style in _plan(model).items() if style == COLUMN
    }
    for name, module in model.base_model.named_modules():
        if any(fnmatch(name, pattern) for pattern in patterns):
            yield module


def _gather_input(group: ProcessGroup) -> Callable[..., Any]:
    def gather(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {
                **kwargs,
                "hidden_states": _GatherTime.apply(kwargs["hidden_states"], group),
            }
        return (_GatherTime.apply(args[0], group), *args[1:]), kwargs

    return gather


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """Within, the module's own parameters are this rank's local tensors (with autograd back to the
    parameters)."""
    stored = dict(module._parameters)
    for name, value in stored.items():
        if value is not None:
            module._parameters[name] = local(value)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(stored)


# Collectives with gradients. "Partial" gradients are summed where they come together.


class _GatherTime(torch.autograd.Function):
    """[rows, time / tp, hidden] -> [rows, time, hidden]; backward sums and splits."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_time(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _scatter_time(gradient, ctx.group), None


class _ScatterTime(torch.autograd.Function):
    """Sum over ranks of [rows, time, hidden] -> this rank's [rows, time / tp, hidden]; backward
    gathers."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_time(partial, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_time(gradient, ctx.group), None


class _SliceTime(torch.autograd.Function):
    """The same [rows, time, hidden] on every rank -> this rank's [rows, time / tp, hidden];
    backward gathers."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        assert whole.shape[1] % group.size() == 0, (
            f"time {whole.shape[1]} does not divide by tp={group.size()}: pad_time was not called"
        )
        ctx.group = group
        return whole.chunk(group.size(), dim=1)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_time(gradient, ctx.group), None


class _SumRanks(torch.autograd.Function):
    """Sum over ranks; the gradient is the same on every rank already."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _GatherTimeOnce(torch.autograd.Function):
    """[rows, time / tp, hidden] -> [rows, time, hidden], where every rank goes on alike:
    backward takes the rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_time(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None


def _gather_time(part: Tensor, group: ProcessGroup) -> Tensor:
    parts = part.new_empty(group.size(), *part.shape)
    dist.all_gather_single(parts.flatten(0, 1), part.contiguous(), group=group)
    return torch.cat(parts.unbind(), dim=1)


def _scatter_time(partial: Tensor, group: ProcessGroup) -> Tensor:
    parts = torch.stack(partial.chunk(group.size(), dim=1))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_single(own, parts.flatten(0, 1), group=group)
    return own
