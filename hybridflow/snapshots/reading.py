"""Reading a snapshot: what a rank needs, out of the boxes of all files, whatever layout wrote them.

Headers are read first; then exactly the boxes that are needed are copied out of mapped files. Every
element must be there exactly once, or nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hybridflow.resharding.boxes import Ints, intersections, overlapping, volumes
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from hybridflow.snapshots.files import (
    DIGEST_DIGITS,
    SUFFIX,
    StoredBox,
    StoredFile,
    rank_files,
    read_header,
)


class FilesMissing(ValueError):
    """Files of a snapshot are not on this node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Whether a rank can load a snapshot."""

    problem: str = ""
    """Why not; empty where it can."""
    is_missing: bool = False
    """Files are not on its node, which may be another node than the one that wrote them; otherwise
    they are damaged or belong to another snapshot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A part of a stored box and the memory that it goes to."""

    file: StoredFile
    stored: StoredBox
    part: Box
    """Within the tensor."""
    shard: LocalShard

    def run(self, memory: Tensor) -> None:
        source = self.file.tensor(self.stored, memory)[_inside(self.part, self.stored.box)]
        self.shard.tensor.detach()[_inside(self.part, self.shard.box)].copy_(source)


class SnapshotFiles:
    """All files of one role's snapshot that this node sees.

    files = SnapshotFiles(Path("checkpoints/step-00000020/actor"))
    files.scalars["num_steps"]
    files.load(engine.state(moments=True, copies=True))
    """

    def __init__(self, directory: Path, stamp: str | None = None) -> None:
        """Reads the headers. A ValueError where there are no files, where one is damaged or of
        another format, or where it has another stamp than `stamp` (None: than the others)."""
        self.directory = directory
        self.files = [read_header(path) for path in rank_files(directory)]
        if not self.files:
            for path in sorted(directory.glob(f"*{SUFFIX}")):
                read_header(path)  # its refusal says more where an earlier version wrote it
            raise FilesMissing(
                f"snapshot directory is {str(directory)!r}; it holds no {SUFFIX[1:]} files: use a "
                "directory of a checkpoint"
            )
        expected = self.files[0].stamp if stamp is None else stamp
        for file in self.files:
            if file.stamp != expected:
                raise ValueError(
                    f"snapshot {file.path}: belongs to snapshot {file.stamp!r}, not to {expected!r}"
                )
        self.scalars = dict(self.files[0].scalars)
        self._boxes: dict[str, list[tuple[StoredFile, StoredBox]]] = {}
        for file in self.files:
            for stored in file.boxes:
                self._boxes.setdefault(stored.name, []).append((file, stored))

    def load(self, parameters: Sequence[LocalParameter]) -> None:
        """Fills the shards' memory. A ValueError, before anything is written, where a tensor is
        missing, has another shape, or is not covered exactly."""
        copies: dict[Path, list[Copy]] = {}
        for parameter in parameters:
            for copy in self._copies(parameter):
                copies.setdefault(copy.file.path, []).append(copy)
        for of_file in copies.values():
            memory = of_file[0].file.mapped()
            for copy in of_file:
                copy.run(memory)

    @property
    def names(self) -> list[str]:
        """The tensors."""
        return list(self._boxes)

    def whole(self, name: str) -> Tensor:
        """One tensor, put together: float32."""
        shape = self._boxes[name][0][1].whole
        tensor = torch.empty(shape)
        shard = LocalShard(Box((0,) * len(shape), shape), tensor)
        self.load([LocalParameter(name, shape, tensor.dtype, (shard,))])
        return tensor

    def check_cover(self, parameters: Sequence[LocalParameter]) -> None:
        """The ValueError that `load` would raise."""
        for parameter in parameters:
            self._copies(parameter)

    def _copies(self, parameter: LocalParameter) -> list[Copy]:
        """What goes where, for the shards of one tensor."""
        sources = self._boxes.get(parameter.name, [])
        if not sources:
            raise FilesMissing(
                f"snapshot {self.directory}: has no {parameter.name}; it is of another model, or "
                "files are missing"
            )
        for file, stored in sources:
            if stored.whole != parameter.shape:
                raise ValueError(
                    f"snapshot {file.path}: {parameter.name} has shape {stored.whole}, the model "
                    f"{parameter.shape}"
                )
        if not parameter.shards:
            return []
        start, shape = _arrays([stored.box for _, stored in sources])
        if overlapping(start, shape):
            raise ValueError(
                f"snapshot {self.directory}: {parameter.name} is there twice in part; the "
                "directory holds files of two snapshots"
            )
        wanted_start, wanted_shape = _arrays([shard.box for shard in parameter.shards])
        wanted, source, low, size = intersections(wanted_start, wanted_shape, start, shape)
        if int(volumes(size).sum()) != int(volumes(wanted_shape).sum()):
            raise FilesMissing(
                f"snapshot {self.directory}: {parameter.name} is not complete; files of some ranks "
                "are missing here"
            )
        copies = []
        for index, (of_shard, of_source) in enumerate(zip(wanted, source, strict=True)):
            dims = len(parameter.shape)
            part = Box(tuple(low[index, :dims].tolist()), tuple(size[index, :dims].tolist()))
            file, stored = sources[of_source]
            shard = parameter.shards[of_shard]
            copies.append(Copy(file=file, stored=stored, part=part, shard=shard))
        return copies


def role_digest(directory: Path, stamp: str) -> str:
    """The digest of all tensors of a role: that of the ledger's line where all its files are there. A
    ValueError where one is damaged."""
    total = 0
    for path in rank_files(directory):
        file = read_header(path)
        if file.stamp == stamp:
            file.check()
            total += sum(stored.digest for stored in file.boxes)
    return f"{total % 2**64:0{DIGEST_DIGITS}x}"


def _arrays(boxes: Sequence[Box]) -> tuple[Ints, Ints]:
    """Starts and shapes as int64 [boxes, dims]; a scalar counts as one element of one dim."""
    starts = [box.start or (0,) for box in boxes]
    shapes = [box.shape or (1,) for box in boxes]
    return np.array(starts, dtype=np.int64), np.array(shapes, dtype=np.int64)


def _inside(part: Box, around: Box) -> tuple[slice, ...]:
    """Indexes the memory of the box `around`."""
    slices = []
    for begin, size, first in zip(part.start, part.shape, around.start, strict=True):
        slices.append(slice(begin - first, begin - first + size))
    return tuple(slices)
