"""Grouping: the generation coordinate (replica, pipeline stage, tensor part) of every rank.

`vanilla` and `zero_redundancy` are the paper's (docs/paper.md section 3); `fewest_bytes` is the
assignment that leaves the fewest bytes to receive for any training layout. Rank order inside a
replica is vLLM's: build_vllm_groups takes `replicas` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray

from hybridflow.layout import Layout
from hybridflow.resharding.assignment import assign
from hybridflow.resharding.boxes import volumes
from hybridflow.resharding.shard_map import ShardMap

PREFERENCE = 0.25
"""Gain, in bytes, of a rank's coordinate in the vanilla grouping. It decides between
assignments that receive the same bytes, so that generation groups stay on neighbouring ranks
where that costs nothing."""


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """A layout whose ranks are numbered by a grouping: order[i] is the rank at place i of the
    mixed-radix numbering.

    Grouping((((0, 2),), ((1, 3),))).layout.groups("tp") == [(0, 2), (1, 3)]
    """

    order: tuple[int, ...] = ()

    def coordinates(self, rank: int) -> dict[str, int]:
        if rank not in self.order:
            raise ValueError(f"layout: rank {rank} is outside 0..{self.size - 1} of {self}")
        return Layout.coordinates(self, self.order.index(rank))

    def rank(self, **coordinates: int) -> int:
        return self.order[Layout.rank(self, **coordinates)]


@dataclass(frozen=True)
class Grouping:
    """Grouping((((0, 2),), ((1, 3),))): two replicas of one stage with tp=2, on ranks 0, 2 and
    1, 3."""

    replicas: tuple[tuple[tuple[int, ...], ...], ...]
    """replicas[replica][stage][tensor part] = rank."""

    def __post_init__(self) -> None:
        ranks = sorted(chain.from_iterable(self.stages))
        if ranks != list(range(len(ranks))):
            raise ValueError(f"grouping: ranks {ranks} are not 0..{len(ranks) - 1}, each once")
        if len(set(map(len, self.replicas))) != 1 or len(set(map(len, self.stages))) != 1:
            raise ValueError(
                "grouping: replicas differ in their sizes; all need the same pp and tp"
            )

    @classmethod
    def of(cls, coordinates: Sequence[tuple[int, int, int]]) -> Grouping:
        """The grouping with the given (replica, stage, tensor part) of every rank."""
        replicas, pp, tp = (max(axis) + 1 for axis in zip(*coordinates, strict=True))
        if not len(coordinates) == len(set(coordinates)) == replicas * pp * tp:
            raise ValueError(
                f"grouping: {len(coordinates)} ranks do not fill {replicas} x {pp} x {tp} "
                "coordinates once each"
            )
        ranks = np.empty((replicas, pp, tp), dtype=np.int64)
        for rank, coordinate in enumerate(coordinates):
            ranks[coordinate] = rank
        return cls(tuple(tuple(map(tuple, replica)) for replica in ranks.tolist()))

    @property
    def stages(self) -> list[tuple[int, ...]]:
        """The ranks of every stage of every replica, replica by replica."""
        return list(chain.from_iterable(self.replicas))

    @property
    def num_ranks(self) -> int:
        return len(self.replicas) * self.pp * self.tp

    @property
    def pp(self) -> int:
        return len(self.replicas[0])

    @property
    def tp(self) -> int:
        return len(self.replicas[0][0])

    @cached_property
    def coordinates(self) -> list[tuple[int, int, int]]:
        """(replica, stage, tensor part) of every rank."""
        result = [(0, 0, 0)] * self.num_ranks
        coordinates = product(range(len(self.replicas)), range(self.pp), range(self.tp))
        for coordinate, rank in zip(coordinates, chain.from_iterable(self.stages), strict=True):
            result[rank] = coordinate
        return result

    @property
    def layout(self) -> GroupedLayout:
        """Axes dp (replicas), pp, tp over the ranks, for generation engines and the actor's
        dispatch."""
        order = tuple(chain.from_iterable(self.stages))
        return GroupedLayout(
            (("dp", len(self.replicas)), ("pp", self.pp), ("cp", 1), ("tp", self.tp)), order
        )

    @property
    def tensor_groups(self) -> list[tuple[int, ...]]:
        """Generation TP groups, by rank."""
        return sorted(self.stages)


def vanilla(num_ranks: int, *, tp: int, pp: int = 1) -> Grouping:
    """HybridFlow-V: generation groups of consecutive ranks."""
    _check_sizes(num_ranks, tp, pp)
    return Grouping.of(list(product(range(num_ranks // (pp * tp)), range(pp), range(tp))))


def zero_redundancy(layout: Layout, *, tp: int, pp: int = 1) -> Grouping:
    """The paper's grouping: generation TP groups at interval t/tg, PP groups at interval p/pg
    (docs/paper.md section 3).

    Every rank's training shard is then part of its generation shard. Raises a ValueError where tg
    does not divide t or pg does not divide p; fewest_bytes has no such limit.
    """
    t, p = layout.axis_size("tp"), layout.axis_size("pp")
    if t % tp or p % pp:
        raise ValueError(
            f"zero-redundancy grouping: generation tp={tp}, pp={pp} must divide training tp={t}, "
            f"pp={p}; use fewest_bytes"
        )
    every_t, every_p = t // tp, p // pp
    coordinates = []
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        data = 0
        for axis, size in layout.axes:
            if axis not in ("pp", "tp"):
                data = data * size + at[axis]
        micro = at["pp"] % every_p * every_t + at["tp"] % every_t
        coordinates.append(
            (data * every_p * every_t + micro, at["pp"] // every_p, at["tp"] // every_t)
        )
    return Grouping.of(coordinates)


def micro_data_groups(layout: Layout, grouping: Grouping) -> list[tuple[int, ...]]:
    """The micro-DP groups, inside which weights are gathered: ranks of a training replica with
    the same generation shard."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, (_, stage, part) in enumerate(grouping.coordinates):
        at = layout.coordinates(rank)
        data = tuple(at[axis] for axis in layout.names if axis not in ("pp", "tp"))
        groups.setdefault((*data, stage, part), []).append(rank)
    return sorted(map(tuple, groups.values()))


def fewest_bytes(source: ShardMap, shards: ShardMap, *, tp: int, pp: int = 1) -> Grouping:
    """The grouping with the fewest bytes received in total, for any source: also FSDP, ZeRO, or
    where tg does not divide t.

    `shards` is the target of a grouping with these sizes in which ranks 0..tp*pp-1 are replica 0,
    such as vanilla; it tells the shard of each coordinate. This is an assignment problem, rank x
    coordinate, whose gain is the bytes of the coordinate's shard that the rank holds.
    """
    _check_sizes(source.num_ranks, tp, pp)
    num_replicas = source.num_ranks // (tp * pp)
    gain = held_bytes(source, shards, tp * pp).astype(np.float64)
    ranks = np.arange(source.num_ranks)
    gain[ranks, ranks % (tp * pp)] += PREFERENCE
    slot = assign(np.repeat(gain, num_replicas, axis=1)) // num_replicas
    num_assigned = [0] * (tp * pp)
    coordinates = []
    for place in slot.tolist():
        coordinates.append((num_assigned[place], place // tp, place % tp))
        num_assigned[place] += 1
    return Grouping.of(coordinates)


def held_bytes(source: ShardMap, shards: ShardMap, num_coordinates: int) -> NDArray[np.int64]:
    """Bytes of each coordinate's shard that every rank holds, in the target's data type: int64
    [ranks, coordinates]."""
    number = source.numbers
    result = np.zeros((source.num_ranks, num_coordinates), dtype=np.int64)
    known: dict[tuple[bytes, ...], NDArray[np.int64]] = {}
    for index, spec in enumerate(shards.parameters):
        have, need = source.rows(number[spec.name]), shards.rows(index)
        first = shards.rank[need] < num_coordinates
        arrays = [source.rank[have], source.start[have], source.shape[have]]
        arrays += [a[need][first] for a in (shards.rank, shards.start, shards.shape)]
        key = tuple(array.tobytes() for array in arrays)
        if key not in known:
            known[key] = _overlap(source.num_ranks, num_coordinates, *arrays)
        result += known[key] * spec.itemsize
    return result


def _overlap(
    num_ranks: int,
    num_coordinates: int,
    rank: NDArray[np.int64],
    start: NDArray[np.int64],
    shape: NDArray[np.int64],
    coordinate: NDArray[np.int64],
    other_start: NDArray[np.int64],
    other_shape: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Elements that every rank holds of every coordinate's boxes."""
    result = np.zeros((num_ranks, num_coordinates), dtype=np.int64)
    for at, low, size in zip(coordinate.tolist(), other_start, other_shape, strict=True):
        common = np.minimum(start + shape, low + size) - np.maximum(start, low)
        np.add.at(result[:, at], rank, volumes(np.maximum(common, 0)))
    return result


def _check_sizes(num_ranks: int, tp: int, pp: int) -> None:
    if tp < 1 or pp < 1 or num_ranks % (tp * pp):
        raise ValueError(
            f"generation tp={tp}, pp={pp}: their product must divide the {num_ranks} ranks"
        )
