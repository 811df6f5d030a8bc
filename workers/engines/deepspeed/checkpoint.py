"""Checkpoints of engine deepspeed, in the form of the other engines: num_steps, and model.NAME,
exp_avg.NAME, exp_avg_sq.NAME in float32.

A rank owns flat ranges of parameters. One of the ranks that share a parameter collects the rest and
writes it whole (a safetensors file holds one box of a name), each its share of the parameters.
Reading takes exactly the boxes that a rank owns, whatever number of ranks, stage or engine has
written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from hybridflow.resharding.shards import Box, LocalParameter, LocalShard, all_parameters
from workers.engines.deepspeed.partitions import Fragment, Partitions
from workers.engines.shared.box_tensor import BoxTensor, collect_flat, flat_views
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.shared.gather import gather_objects
from workers.engines.shared.optimizer import MOMENTS

Shapes = dict[str, tuple[int, ...]]


def save_state(owned: Partitions, shapes: Shapes, num_steps: int, directory: Path) -> None:
    """Collective."""
    fragments: dict[str, Fragment] = {}
    local: dict[str, tuple[int, int]] = {}
    for fragment in owned.fragments:
        fragments[fragment.name] = fragment
        local[fragment.name] = fragment.begin, fragment.end
    ranges = gather_objects(local)
    state: dict[str, Tensor] = {"num_steps": torch.tensor(num_steps)}
    for number, (name, shape) in enumerate(shapes.items()):
        if name not in fragments:
            continue
        fragment, box = fragments[name], Box((0,) * len(shape), shape)
        holders = {rank: of_rank[name] for rank, of_rank in enumerate(ranges) if name in of_rank}
        writer = list(holders)[number % len(holders)]
        for kind, flats in _kinds(owned).items():
            part = fragment.of(flats[fragment.group])
            whole = collect_flat(part, holders, writer, box.numel)
            if whole is not None:
                state[f"{kind}.{name}"] = BoxTensor(shape, [(box, whole.view(shape))])
    save_tensors(state, directory)


def load_state(owned: Partitions, shapes: Shapes, directory: Path) -> int:
    """Collective; the number of steps taken. ValueError if there is no such checkpoint."""
    state: dict[str, Tensor] = {"num_steps": torch.tensor(0)}
    for kind, flats in _kinds(owned).items():
        for piece in owned.fragments:
            shape = shapes[piece.name]
            state[f"{kind}.{piece.name}"] = BoxTensor(
                shape, list(_boxes(piece, shape, flats[piece.group]))
            )
    load_tensors(state, directory)
    num_steps = int(state["num_steps"])
    for moments in owned.states():
        moments["step"].fill_(float(num_steps))
    owned.publish()
    return num_steps


def master_parameters(owned: Partitions, shapes: Shapes) -> list[LocalParameter]:
    """This rank's float32 weights, as boxes of every logical parameter."""
    masters = owned.masters
    shards: dict[str, list[LocalShard]] = {}
    for piece in owned.fragments:
        boxes = _boxes(piece, shapes[piece.name], masters[piece.group])
        shards[piece.name] = list(starmap(LocalShard, boxes))
    return all_parameters(shapes, shards, torch.float32)


def _boxes(piece: Fragment, shape: tuple[int, ...], flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """A fragment of a flat buffer as boxes of its parameter; the tensors are views."""
    return flat_views(shape, piece.begin, piece.end, piece.of(flat.detach()))


def _kinds(owned: Partitions) -> dict[str, list[Tensor]]:
    """Prefix in the checkpoint -> flat buffers."""
    states = owned.states()
    kinds = {"model": [master.detach() for master in owned.masters]}
    for moment in MOMENTS:
        kinds[moment] = [state[moment] for state in states]
    return kinds
