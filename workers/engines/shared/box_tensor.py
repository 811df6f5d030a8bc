"""Parts of parameters that lie in flat buffers, as boxes: for checkpoints and shard maps.

A data rank owns ranges of flattened parameters. A range is at most a few boxes; a parameter whose
ranges lie on several ranks is collected by one of them before it is written, since a safetensors
file holds one box of a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter


class BoxTensor(Tensor):
    """A logical tensor of which this rank holds some boxes: what torch.distributed.checkpoint asks
    of a sharded tensor, nothing else.

    BoxTensor((8, 4), [(Box((0, 0), (1, 2)), memory)])
    """

    shards: list[tuple[Box, Tensor]]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], shards: list[tuple[Box, Tensor]]) -> BoxTensor:
        like = shards[0][1]
        wrapper: BoxTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        return wrapper

    def __init__(self, shape: tuple[int, ...], shards: list[tuple[Box, Tensor]]) -> None:
        self.shards = shards

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} on a BoxTensor: it only tells checkpoints what is where")

    def __create_write_items__(self, name: str, _object: object) -> list[WriteItem]:
        items = []
        for box, tensor in self.shards:
            data = TensorWriteData(
                chunk=_chunk(box),
                properties=TensorProperties.create_from_tensor(tensor),
                size=self.shape,
            )
            index = MetadataIndex(name, torch.Size(box.start))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.shards]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(tensor for box, tensor in self.shards if torch.Size(box.start) == index.offset)


def box_tensors(prefix: str, parameters: list[LocalParameter]) -> dict[str, Tensor]:
    """The parameters as a checkpoint's tensors PREFIX.NAME; those of which this rank holds nothing
    are left out."""
    tensors: dict[str, Tensor] = {}
    for parameter in parameters:
        if parameter.shards:
            shards = [(shard.box, shard.tensor.detach()) for shard in parameter.shards]
            tensors[f"{prefix}.{parameter.name}"] = BoxTensor(parameter.shape, shards)
    return tensors


def flat_views(
    shape: tuple[int, ...], begin: int, end: int, flat: Tensor
) -> Iterator[tuple[Box, Tensor]]:
    """Elements begin..end-1 of a flattened tensor of `shape`, which lie in `flat` from its
    start on, as boxes and views of `flat`."""
    for box in flat_range_boxes(shape, begin, end):
        yield box, flat[: box.numel].view(box.shape)
        flat = flat[box.numel :]


def collect_flat(
    local: Tensor,
    ranges: Mapping[int, tuple[int, int]],
    writer: int,
    numel: int,
    group: ProcessGroup | None = None,
) -> Tensor | None:
    """The flattened tensor of `numel` elements on rank `writer` of `group`, None on the others.

    `ranges`: begin and end of the elements of each rank that has some; those ranks call it
    together, each with its `local` elements.
    """
    rank = dist.get_rank(group)
    if rank != writer:
        dist.send(local.contiguous(), group=group, group_dst=writer)
        return None
    if len(ranges) == 1:
        return local
    whole = torch.empty(numel, dtype=local.dtype, device=local.device)
    for other, (begin, end) in ranges.items():
        if other == rank:
            whole[begin:end] = local
        else:
            dist.recv(whole[begin:end], group=group, group_src=other)
    return whole


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.start), sizes=torch.Size(box.shape))
