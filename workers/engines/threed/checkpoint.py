"""Saving and restoring of engine `threed`, as engine fsdp does: num_steps, and model.NAME, exp_avg.NAME,
exp_avg_sq.NAME in float32.

A data rank's part of a flat buffer is a range of flattened shards: whole shards and, at its ends, pieces of
one. Of a shard that two data ranks share, the first collects the rest and writes it whole (a safetensors file
holds one box of a name); nothing else is moved. A rank reads exactly the boxes that it holds, whatever layout
or engine has written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from workers.engines.shared.checkpoint import load_tensors, save_tensors
from workers.engines.threed.optimizer import FlatGroup, ZeroOptimizer

KINDS = {"weight": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of ZeroOptimizer.tensors -> prefixes in the checkpoint."""


class BoxTensor(Tensor):
    """A logical tensor of which this rank holds some boxes: what torch.distributed.checkpoint asks of a
    sharded tensor, nothing else.

    BoxTensor((8, 4), [(Box((0, 0), (1, 2)), memory)])
    """

    shards: list[tuple[Box, Tensor]]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], shards: list[tuple[Box, Tensor]]) -> BoxTensor:
        like = shards[0][1]
        wrapper: BoxTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return wrapper

    def __init__(self, shape: tuple[int, ...], shards: list[tuple[Box, Tensor]]) -> None:
        self.shards = shards

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{function} on a BoxTensor: it only tells checkpoints what is where")

    def __create_write_items__(self, name: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(box.start)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties.create_from_tensor(tensor), size=self.shape
                ),
            )
            for box, tensor in self.shards
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.shards]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(tensor for box, tensor in self.shards if torch.Size(box.start) == index.offset)


def save_state(
    optimizer: ZeroOptimizer, directory: Path, *, writes_replicated: bool, writes_tied: bool
) -> None:
    """Collective. Of elements that several ranks hold, one writes: that of tensor coordinate 0, and of the
    first stage."""
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
                    state[f"{KINDS[kind]}.{piece.name}"] = BoxTensor(piece.shape, [(piece.box, whole)])
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


def master_parameters(groups: list[FlatGroup], logical: dict[str, tuple[int, ...]]) -> list[LocalParameter]:
    """This rank's float32 weights, as boxes of every logical parameter of the model."""
    held = {
        piece.name: tuple(LocalShard(box, tensor) for box, tensor in _boxes(group, index, group.master))
        for group in groups
        for index, piece in enumerate(group.pieces)
    }
    return [LocalParameter(name, shape, torch.float32, held.get(name, ())) for name, shape in logical.items()]


def _boxes(group: FlatGroup, index: int, flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """What the data rank's part `flat` holds of a piece."""
    piece = group.pieces[index]
    begin, end = group.part_of(index)
    if begin >= end:
        return
    first = group.starts[index] - group.part.start + begin
    for box in flat_range_boxes(piece.box.shape, begin, end):
        start = tuple(inner + outer for inner, outer in zip(box.start, piece.box.start, strict=True))
        yield Box(start, box.shape), flat[first : first + box.numel].view(box.shape)
        first += box.numel


def _whole(group: FlatGroup, index: int, flat: Tensor) -> Tensor | None:
    """A piece on the first data rank that holds some of it, None on the others; collective over the data
    ranks."""
    box = group.pieces[index].box
    start, size = group.starts[index], group.part_size
    first, last = start // size, (start + box.numel - 1) // size
    here = group.data_group.rank()
    if not first <= here <= last:
        return None
    begin, end = group.part_of(index)
    offset = start - group.part.start
    own = flat[offset + begin : offset + end]
    if first == last:
        return own.view(box.shape)
    if here != first:
        dist.send(own, group=group.data_group, group_dst=first)
        return None
    whole = torch.empty(box.numel, dtype=flat.dtype, device=flat.device)
    whole[begin:end] = own
    for other in range(first + 1, last + 1):
        low, high = other * size - start, min((other + 1) * size - start, box.numel)
        dist.recv(whole[low:high], group=group.data_group, group_src=other)
    return whole.view(box.shape)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.start), sizes=torch.Size(box.shape))
