"""The devices of a run as the mapper's cluster, and which nodes of Ray's cluster they are.

Reads this machine's CUDA properties where the run names no cluster; starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from cluster.gpus import divided_gpus, gpus
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster, DeviceKind, NodeGroup
from recipes.config import Device, RunConfig

CPU_KIND = "cpu"
RAY_NAMES = {"RTX4090": "GeForce-RTX-4090"}
"""Chips that Ray's accelerator_type has another name for."""


def knows_devices(config: RunConfig) -> bool:
    """Whether the run names a cluster or this machine has devices to look at."""
    return bool(config.plan.cluster) or config.device is Device.cpu or bool(gpus())


def cluster_of(config: RunConfig) -> Cluster:
    """plan.cluster, or this machine's devices for the run; their speed is the measured one where a
    cluster.json is beside plan.calibration."""
    if config.plan.cluster:
        return Cluster.parse(config.plan.cluster)
    num_devices = sum(pool.num_devices for pool in config.pools.values()) or config.num_devices
    if config.plan.calibration:
        measured = Path(config.plan.calibration).parent / "cluster.json"
        if measured.is_file():
            return _one_node(Cluster.load(measured).groups[0].kind, num_devices)
    if config.device is Device.cpu:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / num_devices
        return _one_node(replace(DEVICE_KINDS[CPU_KIND], memory_bytes=memory), num_devices)
    devices = gpus()
    if not devices:
        raise ValueError(
            "plan.cluster is not set and this machine has no CUDA device to look at; name the "
            "cluster, such as 2x8xH100-80GB"
        )
    kind, per_node = local_kind(devices, divided_gpus()), len(devices)
    if num_devices <= per_node:
        return _one_node(kind, num_devices)
    nodes = NodeGroup(
        kind=replace(kind, devices_per_node=per_node), num_nodes=-(-num_devices // per_node)
    )
    return Cluster(groups=(nodes,))


def node_resources(config: RunConfig, cluster: Cluster) -> dict[str, str]:
    """Device kind -> the Ray resource of its nodes, where the cluster has several kinds.
    Resources that do not tell every kind from the others are a ValueError."""
    kinds = list(dict.fromkeys(group.kind.name for group in cluster.groups))
    resources = _named_resources(config.plan.node_resources, kinds, cluster)
    if config.device is Device.cuda and any(kind.startswith(CPU_KIND) for kind in kinds):
        raise ValueError(
            f"plan.cluster is {cluster} with device=cuda: the devices of a run are all GPUs or "
            "all CPU processes; leave cpu out, or set device=cpu"
        )
    if len(kinds) == 1:
        return resources
    chips = {name.partition("-")[0] for name in DEVICE_KINDS if name != CPU_KIND}
    for kind in kinds:
        chip = kind.partition("-")[0]
        if chip in chips and config.device is Device.cuda:
            resources.setdefault(kind, f"accelerator_type:{RAY_NAMES.get(chip, chip)}")
        elif kind not in resources:
            raise ValueError(
                f"{cluster} has several kinds of devices, and nothing says which of Ray's nodes "
                f'have {kind}; give those nodes a resource (ray start --resources=\'{{"{kind}": '
                f"1}}') and set plan.node_resources=[{kind}:{kind}]"
            )
    if len(set(resources.values())) < len(kinds):
        pairs = ", ".join(f"{kind}:{name}" for kind, name in resources.items())
        raise ValueError(
            f"plan.node_resources ({pairs}) does not tell the kinds of {cluster} apart; give the "
            "nodes of each kind a resource of their own"
        )
    return resources


def _named_resources(
    pairs: Sequence[str], kinds: Sequence[str], cluster: Cluster
) -> dict[str, str]:
    """plan.node_resources as kind -> resource."""
    resources: dict[str, str] = {}
    for pair in pairs:
        kind, _, resource = pair.partition(":")
        if not resource:
            raise ValueError(
                f"plan.node_resources is {list(pairs)}; each is KIND:RESOURCE, such as "
                f"{kinds[0]}:big_nodes"
            )
        resources[kind] = resource
    unknown = sorted(set(resources) - set(kinds))
    if unknown:
        raise ValueError(
            f"plan.node_resources names {unknown}, which are no kinds of {cluster}; it has "
            f"{', '.join(kinds)}"
        )
    return resources


def _one_node(kind: DeviceKind, num_devices: int) -> Cluster:
    return Cluster(
        groups=(NodeGroup(kind=replace(kind, devices_per_node=num_devices), num_nodes=1),)
    )


def local_kind(devices: Sequence[tuple[str, int]], divided: Sequence[str]) -> DeviceKind:
    """The known kind that this machine's GPUs are, with the memory that they say they have; a
    ValueError for GPUs of several kinds, unknown ones, and `divided` ones (MIG)."""
    name, memory_bytes = devices[0]
    names = list(dict.fromkeys(name for name, _ in devices))
    if len(names) > 1:
        raise ValueError(
            f"plan.cluster is not set, and this machine has GPUs of several kinds ({', '.join(names)}); "
            "show Ray those of one kind (CUDA_VISIBLE_DEVICES before `ray start`), and name them in "
            "plan.cluster"
        )
    if divided:
        raise ValueError(
            f"plan.cluster is not set, and MIG divides {divided[0]}, so that the memory of a process is not "
            "known; describe the slices in a JSON file, or turn MIG off (nvidia-smi -mig 0)"
        )
    same_chip = [
        kind for known, kind in DEVICE_KINDS.items() if _is_chip(known.partition("-")[0], name)
    ]
    if not same_chip or not memory_bytes:
        raise ValueError(
            f"plan.cluster is not set, and {name} is none of {', '.join(DEVICE_KINDS)}; describe the "
            "devices in a JSON file"
        )
    nearest = min(same_chip, key=lambda kind: abs(kind.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=float(memory_bytes))


def _is_chip(chip: str, device_name: str) -> bool:
    """Whether the device is of the chip: "NVIDIA GeForce RTX 4090" of RTX4090, "NVIDIA L40S" of L40S
    and not of L4."""
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    pairs = map("".join, pairwise(words))
    return chip in words or chip in pairs
