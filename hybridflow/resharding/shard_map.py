"""ShardMap: the boxes of every logical parameter that each rank holds; plain data, the input of a
plan.

Where a rank's boxes lie in its memory is in LocalParameter (shards.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.resharding.boxes import Ints, overlapping, volumes
from hybridflow.resharding.shards import Box, LocalParameter

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""Names of the data types that parameters may have."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """ParameterSpec("model.norm.weight", (4096,), "bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A key of DTYPES."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"parameter {self.name}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}"
            )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, eq=False)
class ShardMap:
    """Rows (parameter, rank, box), sorted by parameter, then rank, in the rank's own order of
    shards.

    shard_map = ShardMap.gather(engine.local_parameters())          # collective
    boxes = {0: [("w", Box((0, 0), (4, 8)))], 1: [("w", Box((4, 0), (4, 8)))]}
    shard_map = ShardMap.of(parameters, boxes, num_ranks=2)
    shard_map.boxes("w", rank=1)                                    # [Box((4, 0), (4, 8))]
    """

    parameters: tuple[ParameterSpec, ...]
    num_ranks: int
    parameter: Ints
    """[rows], index into parameters."""
    rank: Ints
    """[rows]"""
    start: Ints
    """[rows, dims]; a parameter with fewer dims has start 0 and size 1 in the further ones."""
    shape: Ints
    """[rows, dims]"""

    @classmethod
    def of(
        cls,
        parameters: Sequence[ParameterSpec],
        boxes_of_rank: Mapping[int, Iterable[tuple[str, Box]]],
        *,
        num_ranks: int,
    ) -> ShardMap:
        """The map of lists of (parameter name, box) per rank; empty boxes are left out.

        Raises a ValueError for an unknown rank or parameter and a box outside of its parameter.
        """
        index = _numbers(parameters)
        if len(index) != len(parameters):
            raise ValueError(
                "shard map: a parameter is named twice; give every logical parameter once"
            )
        dims = max((len(spec.shape) for spec in parameters), default=0)
        rows: list[tuple[int, ...]] = []
        for rank, boxes in boxes_of_rank.items():
            if not 0 <= rank < num_ranks:
                raise ValueError(
                    f"shard map: rank {rank} is outside 0..{num_ranks - 1}; relabel ranks first"
                )
            for name, box in boxes:
                if name not in index:
                    raise ValueError(
                        f"shard map: rank {rank} holds {name!r}, which is not among the parameters"
                    )
                _check_box(parameters[index[name]], box, rank)
                if box.numel:
                    fill = dims - len(box.start)
                    rows.append(
                        (index[name], rank, *box.start, *(0,) * fill, *box.shape, *(1,) * fill)
                    )
        table = np.array(rows, dtype=np.int64).reshape(-1, 2 + 2 * dims)
        return cls._sorted(tuple(parameters), num_ranks, table, dims)

    @classmethod
    def _sorted(
        cls, parameters: tuple[ParameterSpec, ...], num_ranks: int, table: Ints, dims: int
    ) -> ShardMap:
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        return cls(
            parameters,
            num_ranks,
            table[:, 0],
            table[:, 1],
            table[:, 2 : 2 + dims],
            table[:, 2 + dims :],
        )

    @classmethod
    def gather(
        cls, local_parameters: Sequence[LocalParameter], group: dist.ProcessGroup | None = None
    ) -> ShardMap:
        """The map of all ranks of `group` (None: the default group, or this process alone without
        one). Collective.

        Ranks that hold nothing (of another pool, say) may pass an empty list; all others list all
        parameters. Raises a ValueError on every rank where two ranks disagree about a parameter's
        shape or dtype.
        """
        local: list[tuple[str, tuple[int, ...], str, list[Box]]] = []
        for parameter in local_parameters:
            dtype = str(parameter.dtype).removeprefix("torch.")
            boxes = [shard.box for shard in parameter.shards]
            local.append((parameter.name, parameter.shape, dtype, boxes))
        gathered = [local]
        if dist.is_initialized():
            gathered = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(gathered, local, group=group)
        specs: dict[str, ParameterSpec] = {}
        boxes_of_rank: dict[int, list[tuple[str, Box]]] = {}
        for rank, rows in enumerate(gathered):
            boxes_of_rank[rank] = []
            for name, shape, dtype, boxes in rows:
                spec = specs.setdefault(name, ParameterSpec(name, tuple(shape), dtype))
                if (spec.shape, spec.dtype) != (tuple(shape), dtype):
                    raise ValueError(
                        f"parameter {name}: rank {rank} has {tuple(shape)} {dtype}, an earlier "
                        f"rank {spec.shape} {spec.dtype}"
                    )
                for box in boxes:
                    boxes_of_rank[rank].append((name, box))
        return cls.of(tuple(specs.values()), boxes_of_rank, num_ranks=len(gathered))

    def relabel(self, ranks: Sequence[int], num_ranks: int) -> ShardMap:
        """The same map in another rank space, such as that of a group over two pools: rank i
        becomes ranks[i] of `num_ranks`."""
        if len(ranks) != self.num_ranks or len(set(ranks)) != len(ranks):
            raise ValueError(
                f"relabel: {self.num_ranks} ranks need {self.num_ranks} different new ranks, got "
                f"{list(ranks)}"
            )
        if not set(ranks) <= set(range(num_ranks)):
            raise ValueError(f"relabel: new ranks {list(ranks)} must lie in 0..{num_ranks - 1}")
        new_rank = np.array(ranks, dtype=np.int64)[self.rank] if len(self.rank) else self.rank
        table = np.concatenate(
            [self.parameter[:, None], new_rank[:, None], self.start, self.shape], axis=1
        )
        return self._sorted(self.parameters, num_ranks, table, self.dims)

    def with_dtype(self, dtype: str) -> ShardMap:
        """The same map with every parameter in `dtype`."""
        parameters = tuple(ParameterSpec(spec.name, spec.shape, dtype) for spec in self.parameters)
        return ShardMap(
            parameters, self.num_ranks, self.parameter, self.rank, self.start, self.shape
        )

    @property
    def dims(self) -> int:
        return int(self.start.shape[1])

    @property
    def names(self) -> list[str]:
        """[parameters], their names."""
        return [spec.name for spec in self.parameters]

    @property
    def numbers(self) -> dict[str, int]:
        """Name of a parameter -> its index in `parameters`."""
        return _numbers(self.parameters)

    @property
    def itemsize(self) -> Ints:
        """[parameters], bytes of an element."""
        return np.array([spec.itemsize for spec in self.parameters], dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model, every element counted once."""
        return sum(spec.num_bytes for spec in self.parameters)

    @property
    def row_bytes(self) -> Ints:
        """[rows], bytes of every box."""
        return volumes(self.shape) * self.itemsize[self.parameter]

    @property
    def bytes_per_rank(self) -> Ints:
        """[num_ranks], bytes that each rank holds."""
        result = np.zeros(self.num_ranks, dtype=np.int64)
        np.add.at(result, self.rank, self.row_bytes)
        return result

    def rows(self, parameter: int) -> slice:
        """The rows of parameter number `parameter`."""
        return slice(
            int(np.searchsorted(self.parameter, parameter)),
            int(np.searchsorted(self.parameter, parameter, side="right")),
        )

    def boxes(self, name: str, rank: int) -> list[Box]:
        """The boxes of parameter `name` that `rank` holds."""
        parameter = self.numbers.get(name)
        if parameter is None:
            raise ValueError(f"shard map: no parameter {name!r}")
        dims = len(self.parameters[parameter].shape)
        rows = self.rows(parameter)
        of_rank = self.rank[rows] == rank
        boxes = []
        for start, shape in zip(self.start[rows][of_rank], self.shape[rows][of_rank], strict=True):
            boxes.append(Box(tuple(start[:dims].tolist()), tuple(shape[:dims].tolist())))
        return boxes

    def check_disjoint(self) -> None:
        """Raises a ValueError where a rank lists the same element of a parameter twice."""
        for parameter, rank, start, shape in self._groups_of_boxes():
            if overlapping(start, shape):
                raise ValueError(
                    f"parameter {self.parameters[parameter].name}: boxes of rank {rank} overlap; "
                    "list every element once"
                )

    def _groups_of_boxes(self) -> Iterator[tuple[int, int, Ints, Ints]]:
        """(parameter, rank, starts, shapes) of every pair that has more than one box."""
        key = self.parameter * self.num_ranks + self.rank
        _, first, count = np.unique(key, return_index=True, return_counts=True)
        for begin, number in zip(first[count > 1], count[count > 1], strict=True):
            rows = slice(int(begin), int(begin + number))
            yield (
                int(self.parameter[begin]),
                int(self.rank[begin]),
                self.start[rows],
                self.shape[rows],
            )

    def digest(self) -> str:
        """SHA-256 over everything in the map: equal maps, equal digests, on any machine."""
        specs = [[spec.name, spec.shape, spec.dtype] for spec in self.parameters]
        hasher = hashlib.sha256(json.dumps([self.num_ranks, specs]).encode())
        for array in (self.parameter, self.rank, self.start, self.shape):
            hasher.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return hasher.hexdigest()


def _numbers(parameters: Sequence[ParameterSpec]) -> dict[str, int]:
    return {spec.name: number for number, spec in enumerate(parameters)}


def _check_box(spec: ParameterSpec, box: Box, rank: int) -> None:
    fits = len(box.start) == len(box.shape) == len(spec.shape) and all(
        start >= 0 and size >= 0 and start + size <= whole
        for start, size, whole in zip(box.start, box.shape, spec.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"parameter {spec.name}: rank {rank} holds {box}, which does not lie in its shape "
            f"{spec.shape}"
        )
