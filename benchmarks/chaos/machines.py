"""A Ray cluster of two nodes on this machine, one of which can be lost and replaced."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.chaos.marks import DIRECTORY
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.supervisor import descendants

NODE_OF_POLICY = "node_of_policy"
"""Ray's resource that only the node has that can be lost."""
HEAD = {"num_cpus": 4, "object_store_memory": 10**8}
OTHER = {"num_cpus": 2, "object_store_memory": 10**8, "resources": {NODE_OF_POLICY: 1}}


class Machines:
    """with machines(directory) as nodes: nodes.settings; nodes.lose_one()"""

    def __init__(self, cluster: Any, directory: Path) -> None:
        self._cluster, self._directory = cluster, directory
        self._node = cluster.add_node(**OTHER)

    @property
    def settings(self) -> tuple[str, ...]:
        """Those of a run whose policy is on the node that is lost."""
        return (
            f"cluster.address={self._cluster.address}",
            "cluster.working_dir=",
            f"pools.policy.node_resource={NODE_OF_POLICY}",
        )

    @property
    def raylet(self) -> int:
        """Process id of Ray's daemon on the node that can be lost."""
        (info,) = self._node.all_processes["raylet"]
        return int(info.process.pid)

    def lose_one(self) -> None:
        """Ends all processes of the node at once, and what they held in memory."""
        raylet = self.raylet
        for pid in (raylet, *descendants(raylet)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        place = MemoryPlace.of(self._directory)
        if place is not None:
            for files in place.directory.glob("*/actor"):
                shutil.rmtree(files, ignore_errors=True)

    def replace(self) -> None:
        """Another node comes into the place of the lost one."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(**OTHER)

    def holds(self, pids: list[int]) -> bool:
        """Whether these processes are on the node that can be lost."""
        return set(pids) <= set(descendants(self.raylet))


@contextmanager
def machines(directory: Path) -> Iterator[Machines]:
    """The cluster for a run in `directory`."""
    from ray.cluster_utils import Cluster

    os.environ[DIRECTORY] = str(directory)  # of the workers that Ray starts
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        yield Machines(cluster, directory)
    finally:
        cluster.shutdown()
        del os.environ[DIRECTORY]
