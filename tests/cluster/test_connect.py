"""connect: an embedded cluster for real (in a process of its own), and what makes a cluster
unfit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cluster.connect import ClusterConfig, _refusal, _resolve, connect, embedded_slots
from cluster.gpus import parse_gpus
from cluster.nodes import DRIVER, NodeInfo, Probe, check_nodes, probe, table

ROOT = Path(__file__).parents[2]

EMBEDDED = """
import json, psutil, ray
from cluster.connect import ClusterConfig, connect

with connect(ClusterConfig(address="local"), cpu_slots=8) as cluster:
    inner = connect(cpu_slots=8)  # joins
    inner.shutdown()
    assert ray.is_initialized()
    hosts = [ray.remote(num_cpus=1)(lambda rank: rank).remote(rank) for rank in range(8)]
    sockets = set()
    for process in psutil.Process().children(recursive=True):
        sockets |= {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"}
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    errors = []
    for need in ({"cpu_slots": 1000}, {"gpus": 1000}):
        try:
            connect(**need)
        except ValueError as error:
            errors.append(str(error))
    result = {
        "modes": [cluster.mode, inner.mode],
        "ranks": ray.get(hosts),
        "slots": cluster.num_cpu_slots,
        "sockets": sorted(sockets),
        "commands": commands,
        "errors": errors,
        "text": cluster.describe(),
        "python": cluster.nodes[0].probe.python,
        "endpoints": cluster.metrics_endpoints,
    }
assert not ray.is_initialized()
print(json.dumps(result))
"""


def test_embedded_cluster_has_slots_beyond_the_cores_and_listens_on_loopback_only() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", EMBEDDED],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert result["modes"] == ["embedded", "joined"]
    assert result["ranks"] == list(range(8)) and result["slots"] == 8 + (
        os.cpu_count() or 1
    ) == embedded_slots(7.5)
    assert result["sockets"] and all(
        address.removeprefix("::ffff:") == "127.0.0.1" for address in result["sockets"]
    )
    assert any("gcs_server" in command for command in result["commands"])
    for idle in ("/monitor.py", "dashboard/dashboard.py"):
        assert not any(idle in command for command in result["commands"])
    assert "1000 CPU slots" in result["errors"][0] and "1000 GPUs" in result["errors"][1]
    assert result["python"] == probe().python and "(embedded) at 127.0.0.1" in result["text"]
    assert result["endpoints"][0].startswith("http://127.0.0.1:")


def node(**changes: Any) -> NodeInfo:
    return NodeInfo(
        node_id="a",
        address="10.0.0.7",
        num_cpu_slots=8,
        num_gpus=0,
        memory_bytes=2**35,
        object_store_bytes=2**33,
        probe=replace(probe(), **changes),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "3.12.1"}, r"10\.0\.0\.7 \(\S+\) runs Python 3\.12\.1, the controller 3\.11"),
        (
            {"versions": {**probe().versions, "ray": "2.59.0"}},
            r"^cluster: .*has ray 2\.59\.0, the controller 2\.60.*make install",
        ),
        ({"has_project": False}, "does not find the hybridflow packages"),
        (
            {"versions": {**probe().versions, DRIVER: "580.1"}},
            r"has NVIDIA driver 580\.1, the controller 590\.2",
        ),
    ],
)
def test_a_node_that_differs_is_named(changes: dict[str, Any], message: str) -> None:
    controller = replace(probe(), versions={**probe().versions, DRIVER: "590.2"})
    with pytest.raises(ValueError, match=message):
        check_nodes([node(), node(**changes)], controller)
    # Another patch release is fine.
    check_nodes([node(), node(python=probe().python.rsplit(".", 1)[0] + ".99")], probe())
    # So is a controller with a GPU beside nodes without one.
    check_nodes([node(versions={**probe().versions, DRIVER: "missing"})], controller)


def test_the_table_shows_devices() -> None:
    gpus = parse_gpus("NVIDIA H200, 143771\nNVIDIA H200, 143771\n")
    text = table([node(), replace(node(gpus=gpus), num_gpus=2)])
    assert text.splitlines()[0].split() == [
        "node",
        "address",
        "cores",
        "CPU",
        "slots",
        "GPUs",
        "memory",
        "object",
        "store",
    ]
    assert "2 (NVIDIA H200 140 GiB, NVIDIA H200 140 GiB)" in text and "32.0 GiB" in text


WRONG = """
from cluster.connect import ClusterConfig, connect
for address in ("127.0.0.1:1", "nonsense"):
    try:
        connect(ClusterConfig(address=address))
    except ValueError as error:
        print(error)
"""


def test_a_wrong_address_is_a_value_error_at_once() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WRONG], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "cluster.address: no Ray cluster answers at '127.0.0.1:1'; start one" in run.stdout, (
        run.stderr
    )
    assert "cluster.address: 'nonsense' is not an address; write host:port" in run.stdout, (
        run.stderr
    )


def test_config_is_a_structured_config() -> None:
    assert OmegaConf.to_object(OmegaConf.structured(ClusterConfig)) == ClusterConfig()
    assert isinstance(probe(), Probe) and connect.__doc__


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Package size (600MiB) exceeds\n the maximum size of 512.00MiB."),
            r"^cluster.working_dir='.' is larger than Ray uploads .*cluster.working_dir='' where",
        ),
        (
            RuntimeError("Version mismatch: Ray: 2.1\nPython: 3.9"),
            r"^RAY_ADDRESS: the cluster at 1.2.3.4:6379 has another Ray or Python .*same versions",
        ),
        (
            ConnectionError("Failed to connect"),
            r"^RAY_ADDRESS: cannot join .*RAY_AUTH_MODE=token, copy ~/.ray/auth_token",
        ),
    ],
)
def test_b96_b97_a_cluster_that_cannot_be_joined_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    text = _refusal("RAY_ADDRESS", "1.2.3.4:6379", ".", error)
    assert re.search(message, text) and "\n" not in text


def test_b95_a_wrong_address_is_told_by_who_set_it() -> None:
    with pytest.raises(
        ValueError, match=r"^RAY_ADDRESS: no Ray cluster answers at .*unset RAY_ADDRESS, or"
    ):
        _resolve("127.0.0.1:1", "RAY_ADDRESS")
    with pytest.raises(ValueError, match=r"^cluster\.address: .*leave it empty to start one here"):
        _resolve("127.0.0.1:1", "cluster.address")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS: 'ray://h:10001' is an address of Ray's"):
        _resolve("ray://h:10001", "RAY_ADDRESS")
