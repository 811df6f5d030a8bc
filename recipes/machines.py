"""The cluster and the pools of a run, and what becomes of its nodes' memory when it has to leave."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from cluster.config import Mode
from controllers.saving import Copy, copy_here
from hybridflow.devices import requested_threads
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec, ResourcePool
from hybridflow.ray_pool import start_pools
from recipes.config import Device, PlacementMode, Runtime
from recipes.placing import Placement
from workers.generation import generation_engine_class

if TYPE_CHECKING:
    from cluster.connect import ClusterInfo

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
        cpu_slots=devices * config.cpus_per_device,
        gpus=gpus,
        nodes_chosen=chosen,
    )


def start_all_pools(
    placement: Placement, cluster: ClusterInfo | None
) -> Mapping[str, ResourcePool]:
    """Every pool by its name, in Ray or (without a cluster) in this process."""
    names = list(dict.fromkeys(role.pool for role in placement.roles))
    specs = [_spec(placement, cluster, name) for name in names]
    pools = list(map(LocalPool, specs)) if cluster is None else start_pools(specs)
    return dict(zip(names, pools, strict=True))


def _spec(placement: Placement, cluster: ClusterInfo | None, name: str) -> PoolSpec:
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


def copy_of(cluster: ClusterInfo | None) -> Copy:
    """How a controller that has to leave brings what the nodes hold in memory to disk."""
    if cluster is None or len(cluster.nodes) == 1:
        return copy_here
    from cluster.gather import gather

    return partial(gather, timeout_s=GATHER_S)
