"""Expert parallelism: the experts of each layer divided over ranks, and tokens that go to them and
come back.

    mesh = expert_mesh(layout, ep, "cuda")
    parts = split_experts(model, parts, mesh.get_group("ep"))   # on meta, before anything is loaded
    model(...)                          # every layer with experts has two exchanges each way

The expert group is folded over the other axes: the ranks of a pipeline stage, tensor ranks first,
then context ranks, then data ranks, in runs of `ep`. Rank r of a group has the r-th run of each
layer's experts, whole, and ranks with the same experts (axis edp) share them out as data ranks
share other weights. A rank sends a row of hidden states for every choice of its tokens to the rank
that has the expert, and multiplies what comes back by the router's weight, so that routers see what
they see without the division. transformers' own code computes the experts of a rank.

The passes of the ranks of a group are one program: each must run as many micro-batches as the
others, empty ones among them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from hybridflow.layout import Layout
from hybridflow.resharding.shards import Box
from hybridflow.wording import counted
from workers.config import TrainConfig
from workers.engines.model.tensor_parts import Parts, TensorPart

COUNT = "num_experts"
"""The attribute by which transformers' modules of experts know how many they have."""
INTERFACE = "_is_expert_parallel"
"""An attribute of modules whose experts transformers computes by one of its own functions."""

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [rows, hidden], experts int64 [rows, chosen], weights [rows, chosen]) -> [rows,
hidden]."""


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the experts of a layer as stacks [experts, ...], by name; the model may
    be on meta."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        known = vars(module)
        if INTERFACE not in known or COUNT not in known:
            continue
        stacks = list(module.parameters(recurse=False))
        if stacks and all(stack.shape[0] == known[COUNT] for stack in stacks):
            found[name] = module
    return found


def check_expert_parallel(model: PretrainedConfig, config: TrainConfig, world_size: int) -> None:
    """ValueError where the experts of the model can't be divided as train.ep says; needs no
    weights."""
    if config.ep == 1:
        return
    name = f"train.ep is {config.ep}"
    with torch.device("meta"):
        modules = find_experts(AutoModel.from_config(copy.deepcopy(model)))
    if not modules:
        raise ValueError(
            f"{name}, but {model.model_type} has no experts that transformers stacks; set ep=1"
        )
    experts = min(vars(module)[COUNT] for module in modules.values())
    ranks = world_size // config.pp
    sizes = [size for size in range(config.tp, ranks + 1, config.tp) if ranks % size == 0]
    sizes = [size for size in sizes if experts % size == 0]
    fix = f"set ep to one of {', '.join(map(str, sizes))}" if sizes else "use other devices or tp"
    if experts % config.ep:
        raise ValueError(
            f"{name}, which does not divide the {experts} experts of {model.model_type}; {fix}"
        )
    if ranks % config.ep:
        has = "a pipeline stage has" if config.pp > 1 else "the model has"
        raise ValueError(
            f"{name}, and {has} {counted(ranks, 'devices')}, which it must divide; {fix}"
        )
    if config.ep % config.tp:
        raise ValueError(
            f"{name} with tp={config.tp}, which does not divide it: experts stay whole on a tensor "
            f"rank; {fix}"
        )
    if config.cp_by_length:
        raise ValueError(
            f"{name} with cp_by_length, whose ranks have passes of their own; set cp_by_length=false"
        )


def expert_mesh(layout: Layout, ep: int, device_type: str) -> DeviceMesh:
    """Mesh [pp, edp, ep]: see the module. Collective."""
    dp, pp, cp, tp = (layout.axis_size(axis) for axis in ("dp", "pp", "cp", "tp"))
    ranks = torch.empty(pp, dp, cp, tp, dtype=torch.int64)
    for stage, data, context, tensor in product(range(pp), range(dp), range(cp), range(tp)):
        place = layout.rank(pp=stage, dp=data, cp=context, tp=tensor)
        ranks[stage, data, context, tensor] = place
    folded = ranks.view(pp, -1, ep)
    return DeviceMesh(device_type, folded, mesh_dim_names=("pp", "edp", "ep"))


def split_experts(
    model: PreTrainedModel, parts: Parts, group: ProcessGroup
) -> dict[str, TensorPart]:
    """Leaves each module of experts of `model`, which is on meta, those of this rank, and has it
    exchange tokens with `group`; what the parameters of the model are then."""
    result = dict(parts)
    for name, module in find_experts(model).items():
        total = vars(module)[COUNT]
        count = total // group.size()
        for attribute, stack in list(module.named_parameters(recurse=False)):
            start = (group.rank() * count, *[0] * (stack.ndim - 1))
            box = Box(start, (count, *stack.shape[1:]))
            full_name = f"{name}.{attribute}"
            part = replace(result[full_name], box=box, divided=True)
            result[full_name] = part
            mine = part.of(stack.detach()).clone()
            module._parameters[attribute] = nn.Parameter(mine, requires_grad=stack.requires_grad)
        vars(module)[COUNT] = count
        module.forward = _exchanging(module.forward, total, group)  # type: ignore[method-assign]
    return result


def _exchanging(compute: Compute, total: int, group: ProcessGroup) -> Compute:
    """`compute`, which knows this rank's experts by numbers from 0, for the choice among `total`."""
    count = total // group.size()

    def run(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        chosen = experts.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        leaving = chosen.new_zeros(total).index_add_(0, chosen, torch.ones_like(chosen))
        leaving = leaving.view(group.size(), count)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=group)
        # Both at once: this is where the host waits for the device.
        sent, received = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
        token_of = order // experts.shape[1]
        rows: Tensor = _Exchange.apply(hidden[token_of], sent, received, group)
        numbers = torch.arange(count, device=hidden.device).repeat(group.size())
        numbers = numbers.repeat_interleave(arriving.flatten(), output_size=sum(received))
        outputs: Tensor = _Exchange.apply(_computed(compute, rows, numbers), received, sent, group)
        place_of = torch.empty_like(order)
        place_of[order] = torch.arange(len(order), device=order.device)
        each = outputs[place_of].view(*experts.shape, -1)
        return (each * weights[..., None]).sum(1).to(hidden.dtype)

    return run


def _computed(compute: Compute, rows: Tensor, numbers: Tensor) -> Tensor:
    """Each row through the expert of its number. A rank without rows has a row of zeros computed,
    so that its weights have a gradient and its backward pass the exchanges of the others'."""
    if len(rows):
        return compute(rows, numbers[:, None], rows.new_ones(len(rows), 1))
    nothing = rows.sum(0, keepdim=True)
    return compute(nothing, numbers.new_zeros(1, 1), rows.new_ones(1, 1))[:0]


class _Exchange(torch.autograd.Function):
    """Rows in the order of the ranks that they go to -> rows in the order of those that sent them;
    backward the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back = _exchange(gradient, ctx.received, ctx.sent, ctx.group)
        return back, None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
