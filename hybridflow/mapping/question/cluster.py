"""Cluster: the devices to plan for: kinds, nodes and links. A cluster may have several kinds.

Numbers here are those of the datasheets; calibration.py says which fraction of them is reached.
Left out: the network's topology above a node (every pair of nodes is taken to be equally far).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hybridflow.mapping.question.files import checked, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKind:
    """One accelerator (or CPU process) and the links of the node that it usually comes in."""

    name: str
    memory_bytes: float
    flops: float
    """Peak of dense products in the compute precision (bf16 on GPUs), per second."""
    memory_bandwidth: float
    """Bytes per second."""
    intra_bandwidth: float
    """Bytes per second and direction that one device exchanges with its node's others."""
    inter_bandwidth: float
    """Bytes per second and direction that one *node* exchanges with other nodes; its devices
    share them."""
    host_bandwidth: float = 25e9
    """Bytes per second between one device and its host's memory (offloading)."""
    devices_per_node: int = 8


GIB = float(1 << 30)

DEVICE_KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind(name="A100-80GB", memory_bytes=80 * GIB, flops=312e12, memory_bandwidth=2.039e12,
                   intra_bandwidth=300e9, inter_bandwidth=25e9),
        DeviceKind(name="A100-40GB", memory_bytes=40 * GIB, flops=312e12, memory_bandwidth=1.555e12,
                   intra_bandwidth=300e9, inter_bandwidth=25e9),
        DeviceKind(name="H100-80GB", memory_bytes=80 * GIB, flops=989e12, memory_bandwidth=3.35e12,
                   intra_bandwidth=450e9, inter_bandwidth=400e9, host_bandwidth=50e9),
        DeviceKind(name="H200-141GB", memory_bytes=141e9, flops=989e12, memory_bandwidth=4.8e12,
                   intra_bandwidth=450e9, inter_bandwidth=400e9, host_bandwidth=50e9),
        DeviceKind(name="B200-180GB", memory_bytes=180e9, flops=2250e12, memory_bandwidth=8e12,
                   intra_bandwidth=900e9, inter_bandwidth=400e9, host_bandwidth=50e9),
        DeviceKind(name="H20-96GB", memory_bytes=96e9, flops=148e12, memory_bandwidth=4e12,
                   intra_bandwidth=450e9, inter_bandwidth=400e9, host_bandwidth=50e9),
        DeviceKind(name="L4-24GB", memory_bytes=24e9, flops=121e12, memory_bandwidth=0.3e12,
                   intra_bandwidth=25e9, inter_bandwidth=12.5e9),
        DeviceKind(name="A10-24GB", memory_bytes=24e9, flops=125e12, memory_bandwidth=0.6e12,
                   intra_bandwidth=25e9, inter_bandwidth=12.5e9),
        DeviceKind(name="RTX4090-24GB", memory_bytes=24e9, flops=165.2e12, memory_bandwidth=1.008e12,
                   intra_bandwidth=12.5e9, inter_bandwidth=12.5e9),
        DeviceKind(name="L40S-48GB", memory_bytes=48e9, flops=362e12, memory_bandwidth=0.864e12,
                   intra_bandwidth=25e9, inter_bandwidth=25e9),
        DeviceKind(name="cpu", memory_bytes=8e9, flops=0.42e12, memory_bandwidth=31e9,
                   intra_bandwidth=0.9e9, inter_bandwidth=0.9e9, host_bandwidth=31e9, devices_per_node=2),
    )
}  # fmt: skip
"""NVIDIA's datasheets (dense bf16, one direction of NVLink). Links between nodes: 200 Gbit/s
for A100, the paper's testbed (section 8.1), 8 x 400 Gbit/s for H100, H200, B200 and H20, 100 Gbit/s
for cards without NVLink (an RTX 4090 copies to others through the host). cpu is one core, measured
together with calibration.CPU; `recipes.calibrate` measures yours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroup:
    """Nodes of one kind. A pool never spans two groups."""

    kind: DeviceKind
    num_nodes: int

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.kind.devices_per_node

    def pool_sizes(self) -> tuple[int, ...]:
        """The sizes that a pool may have: any number inside a node, whole nodes above, so that
        packing never splits a node between two large pools and tensor-parallel groups stay
        inside nodes."""
        per_node = self.kind.devices_per_node
        return (*range(1, per_node), *range(per_node, self.num_devices + 1, per_node))

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.kind.devices_per_node}x{self.kind.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Cluster.parse("16x8xA100-80GB"); Cluster.parse("4x8xH100-80GB+8x8xA100-80GB");
    Cluster.parse("2xcpu"); Cluster.parse("8xH100"), where a chip has one memory."""

    groups: tuple[NodeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups or any(group.num_nodes < 1 for group in self.groups):
            raise ValueError(
                "cluster: no nodes; give at least one group with num_nodes >= 1, for example "
                "2x8xA100-80GB"
            )

    @classmethod
    def parse(cls, text: str, kinds: dict[str, DeviceKind] | None = None) -> Cluster:
        """Reads NODESxDEVICESxKIND or DEVICESxKIND, joined by +, or a JSON file that `save`
        wrote."""
        if text.endswith(".json"):
            return cls.load(Path(text))
        known = kinds or DEVICE_KINDS
        return cls(groups=tuple(_parse_group(part.strip(), known) for part in text.split("+")))

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Reads a JSON file: {"groups": [{"num_nodes": 2, "kind": {...}}]}."""
        content = read_json(path, "cluster")
        if not isinstance(content.get("groups"), list):
            raise ValueError(
                f'cluster file {path}: there is no list "groups"; it needs groups of num_nodes and kind'
            )
        groups = []
        for number, entry in enumerate(content["groups"]):
            group = checked(NodeGroup, entry, f"cluster file {path}: groups[{number}]")
            kind = checked(DeviceKind, group["kind"], f"cluster file {path}: groups[{number}].kind")
            groups.append(NodeGroup(kind=DeviceKind(**kind), num_nodes=group["num_nodes"]))
        return cls(groups=tuple(groups))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    def with_nodes(self, num_nodes: int) -> Cluster:
        """The same kinds with `num_nodes` nodes in the first group."""
        return replace(
            self, groups=(replace(self.groups[0], num_nodes=num_nodes), *self.groups[1:])
        )

    def __str__(self) -> str:
        return "+".join(map(str, self.groups))


def _parse_group(text: str, kinds: dict[str, DeviceKind]) -> NodeGroup:
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)", text)
    if match is None:
        raise ValueError(
            f"cluster {text!r} is not of the form NODESxDEVICESxKIND or DEVICESxKIND, for example "
            "16x8xA100-80GB"
        )
    nodes, devices, name = match.groups()
    of_chip = [known for known in kinds if known.partition("-")[0] == name]
    if len(of_chip) == 1:
        (name,) = of_chip
    if len(of_chip) > 1:
        raise ValueError(
            f"cluster {text!r}: {name} comes with several memories; say {' or '.join(of_chip)}"
        )
    if name not in kinds:
        raise ValueError(
            f"cluster {text!r}: unknown device kind {name!r}; known: {', '.join(kinds)} (or "
            "describe yours in a JSON file)"
        )
    if int(devices) < 1 or int(nodes or 1) < 1:
        raise ValueError(f"cluster {text!r} has no devices; give at least one")
    if nodes is not None:
        return NodeGroup(
            kind=replace(kinds[name], devices_per_node=int(devices)), num_nodes=int(nodes)
        )
    usual = kinds[name].devices_per_node
    if int(devices) > usual and int(devices) % usual == 0:
        return NodeGroup(kind=kinds[name], num_nodes=int(devices) // usual)
    return NodeGroup(kind=replace(kinds[name], devices_per_node=int(devices)), num_nodes=1)
