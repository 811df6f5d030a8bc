"""Placements: which roles share a pool (set partitions), and whether pools of given sizes fit on the
nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridflow.mapping.question.cluster import Cluster

Placement = tuple[tuple[str, ...], ...]
"""Sets of roles, one per pool; roles keep their order of first use."""


def placements(roles: Sequence[str]) -> Iterator[Placement]:
    """All set partitions of `roles`: Bell(4) = 15, Bell(5) = 52 (docs/paper.md section 4).

    list(placements(["a", "b"])) -> [(("a", "b"),), (("a",), ("b",))]
    """
    if not roles:
        yield ()
        return
    *front, last = roles
    for placement in placements(front):
        for index, members in enumerate(placement):
            yield (*placement[:index], (*members, last), *placement[index + 1 :])
        yield (*placement, (last,))


def packs(cluster: Cluster, pools: Sequence[tuple[int, int]]) -> bool:
    """Whether pools (group, devices) fit: whole nodes first, then the pools smaller than a node side by side
    on the rest."""
    for number, group in enumerate(cluster.groups):
        per_node = group.kind.devices_per_node
        sizes = [size for where, size in pools if where == number]
        whole = sum(size // per_node for size in sizes)
        small = sorted((size % per_node for size in sizes if size % per_node), reverse=True)
        if whole > group.num_nodes or not _fill(small, [per_node] * min(len(small), group.num_nodes - whole)):
            return False
    return True


def _fill(sizes: list[int], room: list[int]) -> bool:
    """Exact bin packing by trying every distinct bin; there are at most as many sizes as roles."""
    if not sizes:
        return True
    for index in range(len(room)):
        if room[index] >= sizes[0] and room[index] not in room[:index]:
            left = [*room[:index], room[index] - sizes[0], *room[index + 1 :]]
            if _fill(sizes[1:], left):
                return True
    return False
