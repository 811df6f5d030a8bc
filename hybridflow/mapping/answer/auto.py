"""choose_placement: from a dataflow and its models to a mapping, or to the reason why there is
none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from hybridflow.dataflow import Dataflow
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool, RolePlan
from hybridflow.mapping.answer.predict import predict
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.search.branch import Solution
from hybridflow.mapping.search.fronts import Fronts
from hybridflow.mapping.search.options import role_options
from hybridflow.mapping.search.placements import packs, placements
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import Setting

MAX_NODES = 512
"""The largest cluster that `smallest_cluster` tries."""


def choose_placement(
    dataflow: Dataflow,
    models: Mapping[str, ModelSpec | None],
    cluster: Cluster,
    workload: Workload,
    *,
    calibration: Calibration | None = None,
    space: SearchSpace | None = None,
) -> DeviceMapping:
    """The fastest mapping of a step; the same inputs always give the same mapping.

    A role whose model is None is a Python function without devices. If nothing fits, the ValueError
    says which model needs how much and which cluster would do.
    """
    setting = Setting(
        dataflow=dataflow,
        models=models,
        cluster=cluster,
        workload=workload,
        calibration=calibration or Calibration(),
        space=space or SearchSpace(),
    )
    best = search(setting).best
    if best is None:
        raise ValueError(shortage(setting))
    return mapping_of(setting, best)


def mapping_of(setting: Setting, solution: Solution) -> DeviceMapping:
    """The search's answer with its predictions; pools are named after their roles."""
    pools, roles = [], []
    parts = zip(solution.placement, solution.allocation, solution.options, strict=True)
    for members, (group, size), options in parts:
        name, kind = "+".join(members), setting.cluster.groups[group].kind.name
        pools.append(Pool(name=name, group=group, kind=kind, num_devices=size, roles=members))
        for role, option in zip(members, options, strict=True):
            roles.append(
                RolePlan(role=role, pool=name, layout=option.layout, generation=option.generation)
            )
    roles.sort(key=lambda plan: setting.roles.index(plan.role))
    return predict(setting, pools, roles)


def shortage(setting: Setting) -> str:
    """The reason why nothing fits: the least that each model needs, and the smallest cluster of
    the same kinds that would do."""
    lines = [f"{setting.dataflow.algorithm} does not fit on {setting.cluster}:"]
    for role in setting.roles:
        need, group, size = least_bytes(setting, role)
        capacity = setting.capacity(group)
        verdict = "fits alone" if need <= capacity else "does not fit even alone"
        model = setting.model(role)
        lines.append(
            f"  {role} ({model.name}, {model.num_parameters / 1e9:.1f}B parameters) needs at "
            f"least {need / 1e9:.1f} GB on each of {size} devices, which have "
            f"{capacity / 1e9:.1f} GB: {verdict};"
        )
    nodes = smallest_cluster(setting)
    if nodes is None:
        lines.append(
            f"not even {MAX_NODES} nodes would do{_obstacle(setting)}; use devices with more "
            "memory, or offload=true"
        )
    else:
        lines.append(f"the smallest cluster that would do: {setting.cluster.with_nodes(nodes)}")
    return "\n".join(lines)


def _obstacle(setting: Setting) -> str:
    """Names the role that does not fit however many nodes there are."""
    large = setting.cluster.with_nodes(MAX_NODES)
    alone = replace(setting, cluster=replace(large, groups=large.groups[:1]))
    devices = alone.cluster.num_devices
    for role in setting.roles:
        options = role_options(alone, role, 0, devices)
        need = min((option.resident + option.transient for option in options), default=float("inf"))
        if need > setting.capacity(0):
            text = f": on each of {devices} devices {role} needs {need / 1e9:.1f} GB"
            if setting.generates(role):
                text += " (generation is cut inside a node only)"
            return text
    return ""


def least_bytes(setting: Setting, role: str) -> tuple[float, int, int]:
    """(bytes per device, node group, devices) of the leanest option of a role that has the
    whole cluster."""
    needs = []
    for group, nodes in enumerate(setting.cluster.groups):
        for size in nodes.pool_sizes():
            for option in role_options(setting, role, group, size):
                needs.append((option.resident + option.transient, group, size))
    if not needs:
        raise ValueError(
            f"{role}: no layout of {setting.model(role).name} fits any pool of {setting.cluster}; "
            "check heads and layers"
        )
    return min(needs)


def smallest_cluster(setting: Setting) -> int | None:
    """The least number of nodes of the first group with which some placement fits; None beyond
    MAX_NODES."""
    large = replace(setting, cluster=setting.cluster.with_nodes(MAX_NODES))
    fronts = Fronts(large)
    smallest: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    best: int | None = None
    for placement in placements(large.roles):
        pools = []
        for roles in placement:
            if roles not in smallest:
                smallest[roles] = _smallest_pools(large, fronts, roles, best)
            pools.append(smallest[roles])
        for allocation in product(*pools):
            nodes = _nodes_needed(setting.cluster, allocation)
            if nodes is not None and (best is None or nodes < best):
                best = nodes
    return best


def _smallest_pools(
    setting: Setting, fronts: Fronts, roles: tuple[str, ...], max_nodes: int | None
) -> list[tuple[int, int]]:
    """(group, devices) of the smallest pool in every node group, up to `max_nodes` nodes of the
    first."""
    result = []
    for group, nodes in enumerate(setting.cluster.groups):
        for size in nodes.pool_sizes():
            if (
                max_nodes is not None
                and group == 0
                and size > max_nodes * nodes.kind.devices_per_node
            ):
                break
            if fronts.cheapest(roles, group, size) is not None:
                result.append((group, size))
                break
    return result


def _nodes_needed(cluster: Cluster, allocation: tuple[tuple[int, int], ...]) -> int | None:
    """Nodes of the first group that the pools need; None if another group is too small."""
    per_node = cluster.groups[0].kind.devices_per_node
    least = max(1, -(-sum(size for group, size in allocation if group == 0) // per_node))
    for nodes in range(least, min(MAX_NODES, least + len(allocation)) + 1):
        if packs(cluster.with_nodes(nodes), allocation):
            return nodes
    return None
