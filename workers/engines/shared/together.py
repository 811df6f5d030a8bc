"""Tensors of a micro-batch on their way to a GPU: one copy for all of them.

A copy from ordinary host memory makes the host wait until it is there, and a micro-batch has a
dozen small tensors. They travel in one page-locked buffer, and nobody waits. On a CPU they stay
where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes at whose multiples a tensor begins."""
Part = TypeVar("Part")
Move = Callable[[Tensor], Tensor]


def moved_together(part: Part, moved: Callable[[Part, Move], Part], device: torch.device) -> Part:
    """`part` with its tensors on `device`; moved(part, move) is the part with each of them, in the
    same order every time, in the hands of `move`."""
    if device.type == "cpu":
        return part
    tensors: list[Tensor] = []

    def find(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    moved(part, find)
    arrived = iter(together(tensors, device))
    return moved(part, lambda _tensor: next(arrived))


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors, on `device`."""
    return list(moved_together(tensors, lambda some, move: list(map(move, some)), device))


def together(
    tensors: Sequence[Tensor], device: torch.device, *, page_locked: bool = True
) -> list[Tensor]:
    """Copies of host tensors on `device`, under way."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    *starts, total = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
    buffer = torch.empty(total, dtype=torch.uint8, pin_memory=page_locked)
    for tensor, start, size in zip(tensors, starts, sizes, strict=True):
        buffer[start : start + size].view(tensor.dtype).copy_(tensor.reshape(-1))
    there = buffer.to(device, non_blocking=True)
    result = []
    for tensor, start, size in zip(tensors, starts, sizes, strict=True):
        view = there[start : start + size].view(tensor.dtype).view(tensor.shape)
        # Writing to one must not look like writing to all, to autograd.
        result.append(view.data)
    return result
