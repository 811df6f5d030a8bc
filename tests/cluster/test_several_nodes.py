"""A Ray cluster of several nodes on this machine: nodes with other versions, or another type of GPU,
are refused before a run starts; a pool spans those that fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.nodes import NodeInfo, accelerator_types, check_accelerators, check_nodes, probe

ROOT = Path(__file__).parents[2]

OTHER_MACHINE = "import platform\nplatform.python_version = lambda: '3.12.4'\n"
"""As sitecustomize.py: what is different about a node with another Python."""

SCRIPT = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from cluster.connect import ClusterConfig, connect
from cluster.keepers import Keepers
from hybridflow.pool import PoolSpec
from hybridflow.ray_pool import RayPool

SIZE = {"num_cpus": 2, "object_store_memory": 10**8}

def attempt(**needs):
    try:
        with connect(ClusterConfig(address=cluster.address, working_dir=""), **needs) as info:
            return len(info.nodes)
    except ValueError as error:
        return str(error)

cluster = Cluster(initialize_head=True, head_node_args=SIZE)
cluster.add_node(**SIZE, num_gpus=1, resources={"accelerator_type:A100": 1})
result = {}
with connect(ClusterConfig(address=cluster.address, working_dir=""), cpu_slots=3, gpus=1) as info:
    with RayPool(PoolSpec(num_devices=3)) as pool:
        result["nodes of the pool"] = len({host.node_id for host in pool.hosts})
    memory, disk = Path(sys.argv[1], "memory"), Path(sys.argv[1], "disk")
    memory.mkdir()
    (memory / "0").write_text("rank 0")
    Keepers().bring(memory, disk, timeout_s=60.0)
    result["gathered"] = {file.name: file.read_text() for file in disk.iterdir()}
other = cluster.add_node(**SIZE, num_gpus=1, resources={"accelerator_type:H100": 1})
result["two types"] = attempt(gpus=1)
result["two types, chosen"] = attempt(gpus=1, nodes_chosen=True)
result["two types, no GPU"] = attempt(cpu_slots=1)
cluster.remove_node(other)
cluster.add_node(**SIZE, env_vars={"PYTHONPATH": sys.argv[2]})
result["other versions"] = attempt()
cluster.shutdown()
print(json.dumps(result))
"""


def test_nodes_that_do_not_fit_are_refused_and_a_pool_spans_the_others(tmp_path: Path) -> None:
    """The last node finds a ray 2.59.0 and Python 3.12 installed, the one before has an H100 beside
    the cluster's A100."""
    (tmp_path / "sitecustomize.py").write_text(OTHER_MACHINE)
    information = tmp_path / "ray-2.59.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.59.0\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), f"{tmp_path}:{ROOT}"],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert result["nodes of the pool"] == 2
    assert result["gathered"] == {"0": "rank 0"}
    assert result["two types, chosen"] == result["two types, no GPU"] == 3
    types, versions = result["two types"], result["other versions"]
    host = probe().hostname
    assert types.startswith("cluster: the nodes have different GPUs: A100 on ")
    assert f"({host}); H100 on " in types
    assert "pools.NAME.node_resource=accelerator_type:A100" in types
    here = probe()
    assert f"({host}) runs Python 3.12.4, the controller {here.python}" in versions
    assert f"has ray 2.59.0, the controller {here.versions['ray']}" in versions
    assert "\n" not in types + versions


def nodes_of(types: list[str], num_gpus: float = 8.0) -> list[NodeInfo]:
    nodes = []
    for number, name in enumerate(types):
        resources = {"CPU": 8.0, f"accelerator_type:{name}": 1.0} if name else {"CPU": 8.0}
        nodes.append(
            NodeInfo(
                node_id=str(number),
                address=f"10.0.0.{number}",
                num_cpu_slots=8,
                num_gpus=num_gpus,
                memory_bytes=2**35,
                object_store_bytes=2**33,
                probe=replace(probe(), hostname=f"node{number}"),
                accelerators=accelerator_types(resources),
            )
        )
    return nodes


def test_types_of_gpus_are_told_apart() -> None:
    check_accelerators(nodes_of(["H100", "H100"]))
    check_accelerators(nodes_of(["H100", "A100"], num_gpus=0))
    with pytest.raises(ValueError, match=r"A100 on 10\.0\.0\.1 \(node1\); H100 on 10\.0\.0\.0 \("):
        check_accelerators(nodes_of(["H100", "A100"]))
    with pytest.raises(ValueError, match=r"H100 on .*; unknown GPUs on 10\.0\.0\.1 \(node1\);"):
        check_accelerators(nodes_of(["H100", ""]))


def test_many_nodes_are_one_line() -> None:
    nodes = nodes_of(["H100"] * 100)
    with pytest.raises(ValueError, match=r"10\.0\.0\.5 .*; and 94 more; install") as error:
        check_nodes(nodes, replace(probe(), python="3.12.4"))
    assert "\n" not in str(error.value) and "10.0.0.6 " not in str(error.value)
