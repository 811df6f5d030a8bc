"""Collectives of tensor parallelism with gradients. Activations between the modules of a layer are
split along time; inside attention and MLP they are whole, and features are split."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class GatherTime(torch.autograd.Function):
    """[rows, time / tp, hidden] -> [rows, time, hidden]; backward sums and splits."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_time(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return scatter_time(gradient, ctx.group), None


class ScatterTime(torch.autograd.Function):
    """Sum over ranks of [rows, time, hidden] -> this rank's [rows, time / tp, hidden]; backward
    gathers."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_time(partial, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gather_time(gradient, ctx.group), None


class SliceTime(torch.autograd.Function):
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
        return gather_time(gradient, ctx.group), None


class SumRanks(torch.autograd.Function):
    """Sum over ranks; the gradient is the same on every rank already."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class GatherTimeOnce(torch.autograd.Function):
    """[rows, time / tp, hidden] -> [rows, time, hidden], where every rank goes on alike:
    backward takes the rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_time(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None


class GatherHeads(torch.autograd.Function):
    """[rows, time, features of this rank] -> all ranks' features, equally many of each; backward
    sums and takes the rank's features."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = part.new_empty(group.size(), *part.shape)
        dist.all_gather_single(parts.flatten(0, 1), part.contiguous(), group=group)
        return torch.cat(parts.unbind(), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        parts = torch.stack(gradient.chunk(ctx.group.size(), dim=-1))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_single(own, parts.flatten(0, 1), group=ctx.group)
        return own, None


def gather_time(part: Tensor, group: ProcessGroup) -> Tensor:
    parts = part.new_empty(group.size(), *part.shape)
    dist.all_gather_single(parts.flatten(0, 1), part.contiguous(), group=group)
    return torch.cat(parts.unbind(), dim=1)


def scatter_time(partial: Tensor, group: ProcessGroup) -> Tensor:
    parts = torch.stack(partial.chunk(group.size(), dim=1))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_single(own, parts.flatten(0, 1), group=group)
    return own
