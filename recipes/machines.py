"""The cluster and the pools of a run, and what becomes of its nodes' memory when it has to leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cluster.config import Mode
from controllers.saving import ONE_NODE, Nodes
from hybridflow.devices import requested_threads
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec, ResourcePool
from hybridflow.ray_pool import start_pools
from recipes.config import Device, PlacementMode, Runtime
from recipes.episodes import num_processes
from recipes.placing import Placement
from workers.generation import generation_engine_class

if TYPE_CHECKING:
    from cluster.connect import ClusterInfo
    from cluster.keepers import Keepers

GATHER_S = 20.0
"""How long the nodes of a run that has to leave may copy a snapshot to disk."""


def connect_cluster(placement: Placement) -> AbstractContextManager[ClusterInfo | None]:
    """Ray with enough slots for all pools; nothing with runtime=local."""
    config, devices = placement.config, placement.num_devices
    for role in placement.roles:
        if "generation" in placement.layouts(role):
            generation_engine_class(role.config.generation.engine).check_device(config.device.value)
    if config.runtime is Runtime.local:
        if config.device is Device.cuda and not torch.cuda.is_available():
            raise ValueError(
                "device=cuda with runtime=local, but this machine has no CUDA device; use "
                "device=cpu"
            )
        return nullcontext()
    from cluster.connect import connect

    gpus = devices if config.device is Device.cuda else 0
    chosen = config.placement is PlacementMode.custom
    for name in placement.pool_sizes:
        chosen = chosen and name in config.pools and bool(config.pools[name].node_resource)
    return connect(
        config.cluster,
        cpu_slots=devices * config.cpus_per_device + num_processes(placement),
        gpus=gpus,
        nodes_chosen=chosen,
    )


def start_all_pools(
    placement: Placement, cluster: ClusterInfo | None
) -> Mapping[str, ResourcePool]:
    """Every pool by its name, in Ray or (without a cluster) in this process."""
    names = list(dict.fromkeys(role.pool for role in placement.roles))
    specs = [pool_spec(placement, cluster, name) for name in names]
    pools = list(map(LocalPool, specs)) if cluster is None else start_pools(specs)
    return dict(zip(names, pools, strict=True))


def pool_spec(placement: Placement, cluster: ClusterInfo | None, name: str) -> PoolSpec:
    """The pool of this name: its devices, its processes' threads and how long they are waited for."""
    config = placement.config
    custom = config.placement is PlacementMode.custom and name in config.pools
    return PoolSpec(
        name=name,
        num_devices=placement.pool_sizes[name],
        device=config.device.value,
        node_resource=config.pools[name].node_resource if custom else "",
        cpus_per_device=config.cpus_per_device,
        threads_per_device=config.threads_per_device or _threads(placement, cluster),
        roles=tuple(role.name for role in placement.roles if role.pool == name),
        # Gloo names what was waited for; NCCL's watchdog ends the process, before the report of every
        # rank's stack if it is first.
        collective_timeout_s=config.call_timeout_s * (2 if config.device is Device.cuda else 0.5),
        call_timeout_s=config.call_timeout_s,
        deterministic=config.deterministic,
    )


def _threads(placement: Placement, cluster: ClusterInfo | None) -> int:
    """Cores of this machine for each device of the run, so that pools that work at the same
    time do not take each other's, or OMP_NUM_THREADS; 0 where the devices are on several nodes,
    which their pools look at."""
    if cluster is None or len(cluster.nodes) > 1 or placement.config.device is Device.cuda:
        return 0
    # Ray sets the variable for the processes that it starts, a submitted job's driver among them.
    if cluster.mode is Mode.embedded and requested_threads():
        return requested_threads()
    return max(1, (os.cpu_count() or 1) // placement.num_devices)


class SeveralNodes:
    """Nodes of a cluster, by their keepers (cluster/keepers.py)."""

    def __init__(self, keepers: Keepers, pools: Mapping[str, ResourcePool], copies: int) -> None:
        self._keepers, self._pools, self._copies = keepers, pools, copies

    def copy(self, directory: Path, keep: Collection[Path]) -> None:
        if self._copies > 1:
            self._keepers.copy(directory, keep)

    def fetch(self, directory: Path, role: str, ranks: Collection[int]) -> None:
        (pool,) = [pool for pool in self._pools.values() if role in pool.role_names]
        nodes = {pool.node(rank) for rank in ranks} - {None}
        self._keepers.fetch(directory, {node for node in nodes if node is not None})

    def bring(self, source: Path, target: Path) -> None:
        self._keepers.bring(source, target, GATHER_S)

    def free(self, directory: Path, keep: Collection[Path]) -> None:
        self._keepers.free(directory, keep)

    def leaving(self) -> dict[str, str]:
        nodes = self._keepers.leaving()
        if not nodes:
            return {}
        if self._keepers.here in nodes:
            os.kill(os.getpid(), signal.SIGTERM)  # as if this machine's own scheduler said it
            return {}
        going = {}
        for name, pool in self._pools.items():
            if not pool.broken and pool.nodes() & nodes:
                going[name] = f"a node of pool {name} was told to leave the cluster"
        return going


@contextmanager
def nodes_of(
    cluster: ClusterInfo | None, pools: Mapping[str, ResourcePool], copies: int
) -> Iterator[Nodes]:
    """The nodes of a run."""
    if cluster is None or len(cluster.nodes) == 1:
        yield ONE_NODE
        return
    from cluster.keepers import Keepers

    keepers = Keepers()
    try:
        yield SeveralNodes(keepers, pools, copies)
    finally:
        keepers.close()
