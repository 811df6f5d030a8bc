"""Whole tensors, and the parts of them that the ranks of some layouts hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard

SHAPES = {
    "model.embed.weight": (64, 24),
    "model.norm.weight": (24,),
    "model.layers.0.weight": (5, 7, 3),
    "exp_avg.embed.weight": (64, 24),
    "model.scale": (),
}
Cut = Callable[[tuple[int, ...], int, int], list[Box]]
"""(shape, rank, ranks) -> the boxes of the rank."""


def whole_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def by_rows(shape: tuple[int, ...], rank: int, ranks: int) -> list[Box]:
    """As FSDP cuts: the first dim, the last ranks may have nothing."""
    if not shape:
        return [Box((), ())] if rank == 0 else []
    piece = -(-shape[0] // ranks)
    begin = min(rank * piece, shape[0])
    size = min(piece, shape[0] - begin)
    return [Box((begin, *(0,) * (len(shape) - 1)), (size, *shape[1:]))] if size else []


def by_columns(shape: tuple[int, ...], rank: int, ranks: int) -> list[Box]:
    """As tensor parallelism cuts a row-parallel matrix; vectors lie on rank 0 alone."""
    if len(shape) < 2:
        return [Box((0,) * len(shape), shape)] if rank == 0 else []
    bounds = [shape[-1] * number // ranks for number in range(ranks + 1)]
    begin, end = bounds[rank], bounds[rank + 1]
    return [Box((*(0,) * (len(shape) - 1), begin), (*shape[:-1], end - begin))]


def flat(shape: tuple[int, ...], rank: int, ranks: int) -> list[Box]:
    """As ZeRO cuts: equal ranges of the flattened tensor."""
    piece = -(-prod(shape) // ranks)
    begin = min(rank * piece, prod(shape))
    return flat_range_boxes(shape, begin, min(begin + piece, prod(shape)))


CUTS: Mapping[str, Cut] = {"rows": by_rows, "columns": by_columns, "flat": flat}


def parts(whole: Mapping[str, Tensor], cut: str, rank: int, ranks: int) -> list[LocalParameter]:
    """This rank's shards, in memory of their own."""
    parameters = []
    for name, tensor in whole.items():
        shape = tuple(tensor.shape)
        shards = []
        for box in CUTS[cut](shape, rank, ranks):
            shards.append(LocalShard(box, tensor[box.slices].clone()))
        parameters.append(LocalParameter(name, shape, tensor.dtype, tuple(shards)))
    return parameters
