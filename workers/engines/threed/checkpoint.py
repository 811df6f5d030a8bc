"""Saving and restoring of engine `threed`, as engine fsdp does: num_steps, and model.NAME,
exp_avg.NAME, exp_avg_sq.NAME in float32.

A data rank's part of a flat buffer is a range of flattened shards: whole shards and, at its ends,
pieces of one, written and read as boxes. A rank reads exactly the boxes that it holds, whatever
layout or engine has written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from hybridflow.resharding.shards import Box, LocalParameter, LocalShard, all_parameters
from workers.engines.shared.box_tensor import BoxTensor, flat_views
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.threed.optimizer import FlatGroup, ZeroOptimizer

KINDS = {"weight": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of ZeroOptimizer.tensors -> prefixes in the checkpoint."""


def save_state(optimizer: ZeroOptimizer, directory: Path) -> None:
    """Collective; of elements that several ranks hold, one writes."""
    save_tensors(_state(optimizer), directory)


def load_state(optimizer: ZeroOptimizer, directory: Path) -> None:
    """Collective; from any layout of the same model. ValueError if there is no such checkpoint."""
    state = _state(optimizer)
    load_tensors(state, directory)
    optimizer.restored(int(state["num_steps"]))


def _state(optimizer: ZeroOptimizer) -> dict[str, Tensor]:
    """What this rank holds, as boxes over its memory."""
    state: dict[str, Tensor] = {"num_steps": torch.tensor(optimizer.num_steps)}
    shards: dict[str, list[tuple[Box, Tensor]]] = {}
    for group, tensors in optimizer.tensors():
        for index, piece in enumerate(group.pieces):
            for kind, flat in tensors.items():
                name = f"{KINDS[kind]}.{piece.name}"
                boxes = shards.setdefault(name, [])
                boxes += _boxes(group, index, flat.detach())
                if boxes:
                    state[name] = BoxTensor(piece.shape, boxes)
    return state


def master_parameters(
    groups: list[FlatGroup], logical: dict[str, tuple[int, ...]]
) -> list[LocalParameter]:
    """This rank's float32 weights, as boxes of every logical parameter of the model."""
    shards: dict[str, list[LocalShard]] = {}
    for group in groups:
        for index, piece in enumerate(group.pieces):
            boxes = starmap(LocalShard, _boxes(group, index, group.master))
            shards.setdefault(piece.name, []).extend(boxes)
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
