"""Saving and restoring of engine `threed`, as engine fsdp does: num_steps, and model.NAME,
exp_avg.NAME, exp_avg_sq.NAME in float32.

A data rank's part of a flat buffer is a range of flattened shards: whole shards and, at its ends,
pieces of one. Of a shard that two data ranks share, the first collects the rest and writes it whole
(a safetensors file holds one box of a name); nothing else is moved. A rank reads exactly the boxes
that it holds, whatever layout or engine has written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from hybridflow.resharding.shards import Box, LocalParameter, LocalShard, all_parameters
from workers.engines.shared.box_tensor import BoxTensor, collect_flat, flat_views
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.threed.optimizer import FlatGroup, ZeroOptimizer

KINDS = {"weight": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of ZeroOptimizer.tensors -> prefixes in the checkpoint."""


def save_state(
    optimizer: ZeroOptimizer, directory: Path, *, writes_replicated: bool, writes_tied: bool
) -> None:
    """Collective. Of elements that several ranks hold, one writes: that of tensor coordinate 0,
    and of the first stage."""
    state: dict[str, Tensor] = {"num_steps": torch.tensor(optimizer.num_steps)}
    for group, tensors in optimizer.tensors():
        for index, piece in enumerate(group.pieces):
            for kind, flat in tensors.items():
                whole = _whole(group, index, flat)
                if (
                    whole is not None
                    and (writes_replicated or not piece.replicated)
                    and (writes_tied or not piece.tied)
                ):
                    state[f"{KINDS[kind]}.{piece.name}"] = BoxTensor(
                        piece.shape, [(piece.box, whole)]
                    )
    save_tensors(state, directory)


def load_state(optimizer: ZeroOptimizer, directory: Path) -> None:
    """Collective; from any layout of the same model. ValueError if there is no such checkpoint."""
    state: dict[str, Tensor] = {"num_steps": torch.tensor(0)}
    for group, tensors in optimizer.tensors():
        for index, piece in enumerate(group.pieces):
            for kind, flat in tensors.items():
                shards = list(_boxes(group, index, flat))
                if shards:
                    state[f"{KINDS[kind]}.{piece.name}"] = BoxTensor(piece.shape, shards)
    load_tensors(state, directory)
    optimizer.restored(int(state["num_steps"]))


def master_parameters(
    groups: list[FlatGroup], logical: dict[str, tuple[int, ...]]
) -> list[LocalParameter]:
    """This rank's float32 weights, as boxes of every logical parameter of the model."""
    shards: dict[str, list[LocalShard]] = {}
    for group in groups:
        for index, piece in enumerate(group.pieces):
            shards[piece.name] = list(starmap(LocalShard, _boxes(group, index, group.master)))
    return all_parameters(logical, shards, torch.float32)


def _boxes(group: FlatGroup, index: int, flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of a piece that the data rank's part `flat` holds."""
    piece = group.pieces[index]
    begin, end = group.part_of(index)
    if begin >= end:
        return
    first = group.starts[index] - group.part.start + begin
    for box, view in flat_views(piece.box.shape, begin, end, flat[first:]):
        yield Box(tuple(map(add, box.start, piece.box.start)), box.shape), view


def _whole(group: FlatGroup, index: int, flat: Tensor) -> Tensor | None:
    """A piece on the first data rank that holds some of it, None on the others; collective over
    the data ranks."""
    box = group.pieces[index].box
    start, size = group.starts[index], group.part_size
    holders = range(start // size, (start + box.numel - 1) // size + 1)
    if group.data_group.rank() not in holders:
        return None
    ranges = {}
    for holder in holders:
        ranges[holder] = max(0, holder * size - start), min((holder + 1) * size - start, box.numel)
    begin, end = group.part_of(index)
    offset = start - group.part.start
    part = flat[offset + begin : offset + end]
    whole = collect_flat(part, ranges, holders[0], box.numel, group.data_group)
    return None if whole is None else whole.view(box.shape)
