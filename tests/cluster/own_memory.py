"""Ray nodes on this machine that have a /dev/shm of their own, which ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from hybridflow.supervisor import descendants

BIN = Path(sys.executable).parent
STORE_BYTES = 10**8


def may_unshare() -> bool:
    """Whether this user may give a process a /dev/shm of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


class Node:
    """A node of the cluster at `address` with two CPU slots and 1 of `resource`."""

    def __init__(self, address: str, resource: str, log: Path) -> None:
        before = node_ids()
        start = (
            f"{BIN / 'ray'} start --address={address} --num-cpus=2 --block "
            f"--object-store-memory={STORE_BYTES} --dashboard-agent-listen-port=0 "
            f"--resources='{{\"{resource}\": 1}}'"
        )
        mounted = f"mount -t tmpfs -o size=512m none /dev/shm && exec {start}"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                ["unshare", "-m", "bash", "-c", mounted],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not node_ids() - before:
            assert time.monotonic() < deadline and self._process.poll() is None, log.read_text()
            time.sleep(0.2)
        (self.node_id,) = node_ids() - before

    def drain(self, address: str, seconds: int) -> None:
        """Ray's own notice that the node leaves."""
        subprocess.run(
            [
                *(str(BIN / "ray"), "drain-node", "--address", address, "--node-id", self.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
                *("--deadline-remaining-seconds", str(seconds)),
            ],
            check=True,
            capture_output=True,
        )

    def lose(self) -> None:
        """All of its processes end at once, and its memory with them."""
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)

    def holds(self, pids: list[int]) -> bool:
        """Whether these processes are on it."""
        return set(pids) <= set(descendants(self._process.pid))


def node_ids() -> set[str]:
    """The cluster's living nodes."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


@contextmanager
def head() -> Iterator[str]:
    """A cluster of its head alone, with four CPU slots; its address. This process joins it."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 4, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
