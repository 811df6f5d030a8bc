"""Grouping: which rank takes which generation coordinate (replica, pipeline stage, tensor part).

`vanilla` and `zero_redundancy` are the paper's (docs/paper.md section 3); `fewest_bytes` is the assignment
that leaves the fewest bytes to receive for any training layout. Rank order inside a replica is vLLM's:
build_vllm_groups takes `replicas` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hybridflow.layout import Layout
from hybridflow.resharding.assignment import assign
from hybridflow.resharding.boxes import volumes
from hybridflow.resharding.shard_map import ShardMap

PREFERENCE = 0.25
"""Gain, in bytes, of a rank's place in the vanilla grouping: decides between assignments that receive the
same bytes, so that generation groups stay on neighbouring ranks where that costs nothing."""


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """A layout whose ranks are placed by a grouping: order[place] is the rank at that place of the
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
    """Grouping((((0, 2),), ((1, 3),))): two replicas of one stage with tp=2, on ranks 0, 2 and 1, 3."""

    replicas: tuple[tuple[tuple[int, ...], ...], ...]
    """replicas[replica][stage][tensor part] = rank."""

    def __post_init__(self) -> None:
        ranks = sorted(rank for replica in self.replicas for stage in replica for rank in stage)
        if ranks != list(range(len(ranks))):
            raise ValueError(f"grouping: ranks {ranks} are not 0..{len(ranks) - 1}, each once")
        if len({(len(replica), len(stage)) for replica in self.replicas for stage in replica}) != 1:
            raise ValueError("grouping: replicas differ in their sizes; all need the same pp and tp")

    @classmethod
    def of(cls, coordinates: Sequence[tuple[int, int, int]]) -> Grouping:
        """From (replica, stage, tensor part) of every rank."""
        place = {at: rank for rank, at in enumerate(coordinates)}
        replicas, pp, tp = (max(at[i] for at in coordinates) + 1 for i in range(3))
        if len(place) != len(coordinates) or len(place) != replicas * pp * tp:
            raise ValueError(
                f"grouping: {len(coordinates)} ranks do not fill {replicas} x {pp} x {tp} coordinates once "
                "each"
            )
        return cls(
            tuple(tuple(tuple(place[i, j, k] for k in range(tp)) for j in range(pp)) for i in range(replicas))
        )

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
        for i, replica in enumerate(self.replicas):
            for j, stage in enumerate(replica):
                for k, rank in enumerate(stage):
                    result[rank] = (i, j, k)
        return result

    @property
    def layout(self) -> GroupedLayout:
        """Axes dp (replicas), pp, tp over the ranks: what a generation engine and the actor's dispatch work
        with."""
        order = tuple(rank for replica in self.replicas for stage in replica for rank in stage)
        return GroupedLayout((("dp", len(self.replicas)), ("pp", self.pp), ("cp", 1), ("tp", self.tp)), order)

    @property
    def tensor_groups(self) -> list[tuple[int, ...]]:
        """Generation TP groups, by rank."""
        return sorted(stage for replica in self.replicas for stage in replica)


def vanilla(num_ranks: int, *, tp: int, pp: int = 1) -> Grouping:
    """HybridFlow-V: generation groups of consecutive ranks."""
    _check_sizes(num_ranks, tp, pp)
    return Grouping.of([(rank // (pp * tp), rank // tp % pp, rank % tp) for rank in range(num_ranks)])


def zero_redundancy(layout: Layout, *, tp: int, pp: int = 1) -> Grouping:
    """The paper's grouping: generation TP groups at interval t/tg, PP groups at interval p/pg, so that every
    rank's training shard is part of its generation shard (equations in docs/paper.md section 3). Needs tg | t
    and pg | p; fewest_bytes has no such limit.
    """
    t, p = layout.axis_size("tp"), layout.axis_size("pp")
    if t % tp or p % pp:
        raise ValueError(
            f"zero-redundancy grouping: generation tp={tp}, pp={pp} must divide training tp={t}, pp={p}; use "
            "fewest_bytes"
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
        coordinates.append((data * every_p * every_t + micro, at["pp"] // every_p, at["tp"] // every_t))
    return Grouping.of(coordinates)


def micro_data_groups(layout: Layout, grouping: Grouping) -> list[tuple[int, ...]]:
    """Ranks of one training replica that hold the same generation shard: the micro-DP groups, inside which
    weights are gathered."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, (_, stage, part) in enumerate(grouping.coordinates):
        at = layout.coordinates(rank)
        data = tuple(at[axis] for axis in layout.names if axis not in ("pp", "tp"))
        groups.setdefault((*data, stage, part), []).append(rank)
    return sorted(tuple(group) for group in groups.values())


def fewest_bytes(source: ShardMap, shards: ShardMap, *, tp: int, pp: int = 1) -> Grouping:
    """The grouping with the fewest bytes received in total, for any source (also FSDP, ZeRO, or where tg does
    not divide t).

    `shards` is the target of any one grouping with these sizes in which rank 0..tp*pp-1 are replica 0
    (vanilla): it says what each coordinate holds. An assignment problem: rank x coordinate, gain = bytes of
    the coordinate that the rank holds.
    """
    _check_sizes(source.num_ranks, tp, pp)
    num_replicas = source.num_ranks // (tp * pp)
    held = held_bytes(source, shards, tp * pp)
    gain = held.astype(np.float64)
    ranks = np.arange(source.num_ranks)
    gain[ranks, ranks % (tp * pp)] += PREFERENCE
    slot = assign(np.repeat(gain, num_replicas, axis=1)) // num_replicas
    taken = [0] * (tp * pp)
    coordinates = []
    for rank in range(source.num_ranks):
        place = int(slot[rank])
        coordinates.append((taken[place], place // tp, place % tp))
        taken[place] += 1
    return Grouping.of(coordinates)


def held_bytes(source: ShardMap, shards: ShardMap, num_coordinates: int) -> NDArray[np.int64]:
    """Bytes (target's data type) that every rank holds of what each coordinate needs: int64 [ranks,
    coordinates]."""
    number = {spec.name: i for i, spec in enumerate(source.parameters)}
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
        raise ValueError(f"generation tp={tp}, pp={pp}: their product must divide the {num_ranks} ranks")
