"""The golden executor: gathers every parameter on every rank, then slices; the tests' oracle and
the benchmark's baseline.

DeepSpeed-Chat does this over all ranks and HybridFlow-V over the model-parallel group
(docs/paper.md section 3). It shares no code with the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hybridflow.resharding.memory import LocalMemory
from hybridflow.resharding.shard_map import DTYPES, ParameterSpec, ShardMap
from hybridflow.resharding.shards import Box, LocalParameter


def reshard_golden(
    source: ShardMap,
    dtypes: Mapping[str, str],
    sources: Sequence[LocalParameter],
    destinations: Sequence[LocalParameter],
    group: dist.ProcessGroup | None = None,
    *,
    bucket_bytes: int = 64 << 20,
) -> int:
    """Fills `destinations` from the full parameters; returns the bytes received. Collective over
    `group`, the ranks of `source`.

    `dtypes` gives the data type of every parameter while it travels (the target's). Holders of the
    same box send equal parts of it. All-gathers are bucketed: the parameters of a bucket have at
    most `bucket_bytes` together.
    """
    targets = {parameter.name: parameter for parameter in destinations}
    received = 0
    memory = LocalMemory(sources)
    with torch.no_grad():
        for bucket in _buckets(source, dtypes, bucket_bytes):
            for number, full, received_bytes in _gather_full(source, bucket, dtypes, memory, group):
                received += received_bytes
                spec = source.parameters[number]
                if spec.name in targets:
                    for shard in targets[spec.name].shards:
                        shard.tensor.detach().copy_(_slice(full, shard.box))
    return received


def bytes_gathered(source: ShardMap) -> NDArray[np.int64]:
    """Bytes that every rank receives in reshard_golden, in the source's data type: int64
    [ranks]."""
    received = np.full(source.num_ranks, source.num_bytes, dtype=np.int64)
    for number, spec in enumerate(source.parameters):
        for rank, box in _parts(source, number):
            received[rank] -= box.numel * spec.itemsize
    return received


def _buckets(source: ShardMap, dtypes: Mapping[str, str], bucket_bytes: int) -> Iterator[list[int]]:
    """Buckets of parameter numbers, from different holders (pipeline stages) in turns, so that
    all ranks have something to send in every bucket."""
    bytes_of_holders: dict[bytes, int] = {}
    progress: dict[int, tuple[bytes, int]] = {}
    for number, spec in enumerate(source.parameters):
        holders = source.rank[source.rows(number)].tobytes()
        bytes_of_holders[holders] = bytes_of_holders.get(holders, 0) + spec.num_bytes
        progress[number] = (holders, bytes_of_holders[holders])
    order = sorted(
        progress, key=lambda number: progress[number][1] / bytes_of_holders[progress[number][0]]
    )
    bucket: list[int] = []
    total = 0
    for number in order:
        spec = source.parameters[number]
        size = spec.numel * DTYPES[dtypes[spec.name]].itemsize
        if bucket and total + size > bucket_bytes:
            yield bucket
            bucket, total = [], 0
        bucket.append(number)
        total += size
    if bucket:
        yield bucket


def _gather_full(
    source: ShardMap,
    bucket: list[int],
    dtypes: Mapping[str, str],
    memory: LocalMemory,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """(parameter, its full tensor, bytes received for it)."""
    parts = {number: _parts(source, number) for number in bucket}
    size = [0] * source.num_ranks
    for number in bucket:
        itemsize = DTYPES[dtypes[source.parameters[number].name]].itemsize
        for rank, box in parts[number]:
            size[rank] += -(-box.numel * itemsize // 8) * 8
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    gathered = torch.empty((source.num_ranks, max(size)), dtype=torch.uint8)
    local = torch.empty(max(size), dtype=torch.uint8)
    offset = 0
    for number in bucket:
        spec = source.parameters[number]
        for holder, box in parts[number]:
            if holder == rank:
                view = memory.view(spec.name, box.start, box.shape)
                offset = _store(local, offset, view, DTYPES[dtypes[spec.name]])
    if dist.is_initialized():
        dist.all_gather(list(gathered.unbind(0)), local, group=group)
    else:
        gathered[0] = local
    offsets = [0] * source.num_ranks
    for number in bucket:
        spec = source.parameters[number]
        dtype = DTYPES[dtypes[spec.name]]
        full = torch.empty(spec.shape, dtype=dtype)
        received = 0
        for holder, box in parts[number]:
            if holder != rank:
                received += box.numel
            end = offsets[holder] + box.numel * dtype.itemsize
            _slice(full, box).copy_(
                gathered[holder, offsets[holder] : end].view(dtype).view(box.shape)
            )
            offsets[holder] = -(-end // 8) * 8
        yield number, full, received * dtype.itemsize


def _slice(full: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of a box in the full parameter."""
    for dim, (start, size) in enumerate(zip(box.start, box.shape, strict=True)):
        full = full.narrow(dim, start, size)
    return full


def _store(buffer: torch.Tensor, offset: int, view: torch.Tensor, dtype: torch.dtype) -> int:
    """Writes `view` in `dtype` at `offset`; returns the offset behind it, a multiple of 8."""
    end = offset + view.numel() * dtype.itemsize
    buffer[offset:end].view(dtype).view(view.shape).copy_(view)
    return -(-end // 8) * 8


def _parts(source: ShardMap, number: int) -> list[tuple[int, Box]]:
    """(sender, box) of every distinct box of the parameter, in equal parts from all of its
    holders."""
    spec: ParameterSpec = source.parameters[number]
    rows, dims = source.rows(number), len(spec.shape)
    holders: dict[Box, list[int]] = {}
    for start, shape, rank in zip(
        source.start[rows].tolist(),
        source.shape[rows].tolist(),
        source.rank[rows].tolist(),
        strict=True,
    ):
        holders.setdefault(Box(tuple(start[:dims]), tuple(shape[:dims])), []).append(rank)
    parts = []
    for box, ranks in holders.items():
        if not box.shape:
            parts.append((ranks[0], box))
            continue
        length = box.shape[0]
        for i, rank in enumerate(ranks):
            low, high = length * i // len(ranks), length * (i + 1) // len(ranks)
            if high > low:
                parts.append(
                    (rank, Box((box.start[0] + low, *box.start[1:]), (high - low, *box.shape[1:])))
                )
    return parts
