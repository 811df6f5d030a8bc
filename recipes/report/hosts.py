"""Host: a row of the page's table of hosts, by hosts.jsonl: how fast each computed between steps, and the
memory that it and its node had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridflow.stragglers import THRESHOLD


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Numbers of the last look at it, and some over all looks."""

    name: str
    node: str
    relative: float
    """Its speed by that of the other hosts."""
    individual: float
    """Its speed by its own best."""
    lowest: float
    """The smallest relative speed of all looks."""
    is_slow: bool
    resident_gb: float
    peak_gb: float
    node_gb: float
    """In use on its node, or in its container."""
    limit_gb: float
    oom_kills: int
    """Processes that the kernel ended there for want of memory."""


def hosts(looks: Sequence[Mapping[str, Any]]) -> list[Host]:
    """Every host of the run, in the order of pools and ranks."""
    latest: dict[tuple[str, int], Mapping[str, Any]] = {}
    lowest: dict[tuple[str, int], float] = {}
    first_kills: dict[str, int] = {}
    for look in looks:
        for host in look["hosts"]:
            key = (host["pool"], host["rank"])
            latest[key] = host
            lowest[key] = min(lowest.get(key, 1.0), host["relative"])
            first_kills.setdefault(host["node"], host["oom_kills"])
    rows = []
    for (pool, rank), host in sorted(latest.items()):
        rows.append(
            Host(
                name=f"{pool} rank {rank}",
                node=host["node"],
                relative=host["relative"],
                individual=host["individual"],
                lowest=lowest[pool, rank],
                is_slow=host["relative"] < THRESHOLD,
                resident_gb=host["resident_bytes"] / 1e9,
                peak_gb=host["peak_bytes"] / 1e9,
                node_gb=host["used_bytes"] / 1e9,
                limit_gb=host["limit_bytes"] / 1e9,
                oom_kills=host["oom_kills"] - first_kills[host["node"]],
            )
        )
    return rows
