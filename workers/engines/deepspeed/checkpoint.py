"""Checkpoints of engine deepspeed, in the form of the other engines: num_steps, and model.NAME, exp_avg.NAME,
exp_avg_sq.NAME in float32.

A rank owns flat ranges of parameters. One of the ranks that share a parameter collects the rest and writes it
whole (a safetensors file holds one box of a name), each its share of the parameters. Reading takes exactly
the boxes that a rank owns, whatever number of ranks, stage or engine has written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from workers.engines.deepspeed.partitions import MOMENTS, Fragment, Partitions
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.threed.checkpoint import BoxTensor

Shapes = dict[str, tuple[int, ...]]


def save_state(owned: Partitions, shapes: Shapes, num_steps: int, directory: Path) -> None:
    """Collective."""
    pieces = {piece.name: piece for piece in owned.fragments}
    ranges: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranges, {name: (piece.begin, piece.end) for name, piece in pieces.items()})
    state: dict[str, Tensor] = {"num_steps": torch.tensor(num_steps)}
    for number, (name, shape) in enumerate(shapes.items()):
        held = {rank: of_rank[name] for rank, of_rank in enumerate(ranges) if name in of_rank}
        writer = list(held)[number % len(held)]
        for kind, flats in _kinds(owned).items():
            own = pieces[name].of(flats[pieces[name].group]) if name in pieces else None
            whole = _whole(own, held, writer, torch.Size(shape).numel())
            if whole is not None:
                state[f"{kind}.{name}"] = BoxTensor(
                    shape, [(Box((0,) * len(shape), shape), whole.view(shape))]
                )
    save_tensors(state, directory)


def load_state(owned: Partitions, shapes: Shapes, directory: Path) -> int:
    """Collective; the number of steps taken. ValueError if there is no such checkpoint."""
    state: dict[str, Tensor] = {"num_steps": torch.tensor(0)}
    for kind, flats in _kinds(owned).items():
        for piece in owned.fragments:
            shape = shapes[piece.name]
            state[f"{kind}.{piece.name}"] = BoxTensor(shape, list(boxes(piece, shape, flats[piece.group])))
    load_tensors(state, directory)
    num_steps = int(state["num_steps"])
    for moments in owned.states():
        moments["step"].fill_(float(num_steps))
    owned.publish()
    return num_steps


def master_parameters(owned: Partitions, shapes: Shapes) -> list[LocalParameter]:
    """This rank's float32 weights, as boxes of every logical parameter."""
    masters = owned.masters
    held = {
        piece.name: tuple(
            LocalShard(box, tensor) for box, tensor in boxes(piece, shapes[piece.name], masters[piece.group])
        )
        for piece in owned.fragments
    }
    return [LocalParameter(name, shape, torch.float32, held.get(name, ())) for name, shape in shapes.items()]


def boxes(piece: Fragment, shape: tuple[int, ...], flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """A fragment of a flat buffer as boxes of its parameter; the tensors are views."""
    memory = piece.of(flat.detach())
    for box in flat_range_boxes(shape, piece.begin, piece.end):
        yield box, memory[: box.numel].view(box.shape)
        memory = memory[box.numel :]


def _kinds(owned: Partitions) -> dict[str, list[Tensor]]:
    """Prefix in the checkpoint -> flat buffers."""
    states = owned.states()
    return {
        "model": [master.detach() for master in owned.masters],
        **{moment: [state[moment] for state in states] for moment in MOMENTS},
    }


def _whole(own: Tensor | None, held: dict[int, tuple[int, int]], writer: int, numel: int) -> Tensor | None:
    """The flattened parameter on rank `writer`, None on the others; `held`: begin and end of the range of
    each rank that has one."""
    rank = dist.get_rank()
    if own is None:
        return None
    if rank != writer:
        dist.send(own.contiguous(), dst=writer)
        return None
    if len(held) == 1:
        return own
    whole = torch.empty(numel, dtype=own.dtype, device=own.device)
    for other, (begin, end) in held.items():
        if other == rank:
            whole[begin:end] = own
        else:
            dist.recv(whole[begin:end], src=other)
    return whole
