"""Placements: which roles share a pool (set partitions), and whether pools of given sizes fit
on the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridflow.mapping.question.cluster import Cluster

Placement = tuple[tuple[str, ...], ...]
"""A set of roles for every pool; roles are in the order of their first use."""


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
    """Whether pools (group, devices) fit: whole nodes first, then the pools smaller than a node
    side by side on the rest."""
    for number, group in enumerate(cluster.groups):
        per_node = group.kind.devices_per_node
        whole, small = 0, []
        for where, size in pools:
            if where == number:
                whole += size // per_node
                if size % per_node:
                    small.append(size % per_node)
        if whole > group.num_nodes:
            return False
        small.sort(reverse=True)
        if not _fill(small, [per_node] * min(len(small), group.num_nodes - whole)):
            return False
    return True


def _fill(sizes: list[int], bins: list[int]) -> bool:
    """Exact bin packing by trying every distinct bin; there are at most as many sizes as roles."""
    if not sizes:
        return True
    for index, free in enumerate(bins):
        if free >= sizes[0] and free not in bins[:index]:
            rest = [*bins[:index], free - sizes[0], *bins[index + 1 :]]
            if _fill(sizes[1:], rest):
                return True
    return False
