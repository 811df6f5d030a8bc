"""Saving and restoring of engine `threed` with torch.distributed.checkpoint.

A rank writes exactly the elements that its ZeRO part holds, and reads exactly those: a range of a flattened shard is a few boxes of the
logical parameter, and torch.distributed.checkpoint finds for every box what any other layout has written. No rank gathers anything.
Per parameter: `weight` (float32), `exp_avg`, `exp_avg_sq`; and `num_steps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box
from workers.engines.threed_optimizer import ZeroOptimizer


class BoxTensor:
    """A logical tensor of which this rank holds some boxes: all that torch.distributed.checkpoint asks of a sharded tensor."""

    def __init__(self, shape: tuple[int, ...], shards: list[tuple[Box, Tensor]]) -> None:
        self.shape, self.shards = torch.Size(shape), shards

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, name: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(box.start)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=TensorProperties.create_from_tensor(tensor), size=self.shape),
            )
            for box, tensor in self.shards
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.shards]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(tensor for box, tensor in self.shards if torch.Size(box.start) == index.offset)


def save_state(optimizer: ZeroOptimizer, directory: Path, *, writes_replicated: bool, writes_tied: bool) -> None:
    """Collective. Of elements that several ranks hold, one writes: that of tensor coordinate 0, and of the first stage."""
    state: dict[str, BoxTensor | Tensor] = {
        key: value
        for key, value, replicated, tied in _entries(optimizer)
        if (writes_replicated or not replicated) and (writes_tied or not tied)
    }
    state["num_steps"] = torch.tensor(optimizer.num_steps)
    dcp.save(state, checkpoint_id=directory, planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False))


def load_state(optimizer: ZeroOptimizer, directory: Path) -> None:
    """Collective; from any layout of the same model. ValueError if there is no such checkpoint."""
    if not (directory / ".metadata").is_file():
        raise ValueError(f"checkpoint directory {directory} has no file .metadata; give the directory that save wrote")
    state: dict[str, Any] = {key: value for key, value, _, _ in _entries(optimizer)}
    state["num_steps"] = torch.tensor(0)
    dcp.load(state, checkpoint_id=directory, planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False))
    optimizer.restored(int(state["num_steps"]))


def _entries(optimizer: ZeroOptimizer) -> Iterator[tuple[str, BoxTensor, bool, bool]]:
    """(key, boxes, held by several tensor ranks, held by two stages) of every tensor of which this rank has a part."""
    for group, tensors in optimizer.tensors():
        for index, piece in enumerate(group.pieces):
            begin, end = group.part_of(index)
            if begin >= end:
                continue
            offset = group.starts[index] - group.part.start + begin
            for kind, flat in tensors.items():
                shards = []
                first = offset
                for box in flat_range_boxes(piece.box.shape, begin, end):
                    start = tuple(inner + outer for inner, outer in zip(box.start, piece.box.start, strict=True))
                    shards.append((Box(start, box.shape), flat[first : first + box.numel].view(box.shape)))
                    first += box.numel
                yield f"{kind}.{piece.name}", BoxTensor(piece.shape, shards), piece.replicated, piece.tied


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.start), sizes=torch.Size(box.shape))
