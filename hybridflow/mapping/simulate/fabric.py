"""Fabric: seconds that collectives and copies take inside a pool, by the alpha-beta model.

Ring algorithms: an all-gather or reduce-scatter of B bytes over g ranks moves (g-1)/g B through
every rank, an all-reduce twice that (Thakur, Rabenseifner and Gropp 2005; Chan et al. 2007).
Between nodes a node's link is shared by all groups of the pool that cross it at the same time. Left
out: contention with other pools, switch topology.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind


@dataclass(frozen=True, slots=True)
class Fabric:
    """Fabric(kind, calibration, num_devices=64).all_reduce(num_bytes=1e9, size=8, stride=8)"""

    kind: DeviceKind
    calibration: Calibration
    num_devices: int
    """Devices of the pool."""

    def all_gather(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds until every rank has `num_bytes`, for groups of `size` ranks that are
        `stride` apart; all such groups of the pool work at once."""
        if size == 1:
            return 0.0
        local, nodes = self._spread(size, stride)
        seconds, latency = 0.0, 0.0
        if local > 1:
            seconds = num_bytes * (size - 1) / size / self._inside
            latency = self.calibration.intra_latency_s * ceil(log2(local))
        if nodes > 1:
            groups_per_node = self._per_node / local
            crossing = groups_per_node * num_bytes * (nodes - 1) / nodes / self._between
            seconds = max(seconds, crossing)
            latency += self.calibration.inter_latency_s * ceil(log2(nodes))
        return seconds + latency

    def all_reduce(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds of an all-reduce: a ring passes twice as many bytes as for an all-gather."""
        return 2.0 * self.all_gather(num_bytes, size, stride)

    def reduce_scatter(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds of a reduce-scatter: every rank begins with `num_bytes` and ends with its
        part of the sum."""
        return self.calibration.reduce_factor * self.all_gather(num_bytes, size, stride)

    def exchange(self, received: float, size: int, stride: int) -> float:
        """Seconds until every rank has `received` bytes from the others of its group, evenly
        spread over them (point to point)."""
        if received <= 0.0 or size == 1:
            return 0.0
        local, nodes = self._spread(size, stride)
        far = (size - local) / (size - 1)
        inside = received * (1 - far) / self._inside
        outside = self._per_node * received * far / self._between
        seconds = max(inside, outside) + self.calibration.intra_latency_s
        if nodes > 1:
            seconds += self.calibration.inter_latency_s
        return seconds

    def send(self, num_bytes: float, stride: int) -> float:
        """Seconds in which every rank sends `num_bytes` to the rank `stride` further (the next
        pipeline stage)."""
        if stride < self._per_node:
            return num_bytes / self._inside + self.calibration.intra_latency_s
        return self._per_node * num_bytes / self._between + self.calibration.inter_latency_s

    @property
    def _inside(self) -> float:
        """Bytes per second that a device reaches inside its node."""
        return self.kind.intra_bandwidth * self.calibration.link_efficiency

    @property
    def _between(self) -> float:
        """Bytes per second that a node reaches with other nodes."""
        return self.kind.inter_bandwidth * self.calibration.link_efficiency

    @property
    def _per_node(self) -> int:
        return min(self.kind.devices_per_node, self.num_devices)

    def _spread(self, size: int, stride: int) -> tuple[int, int]:
        """(ranks of a group on the same node, nodes that the group spans)."""
        local = max(1, min(size, self._per_node // stride))
        return local, ceil(size / local)
