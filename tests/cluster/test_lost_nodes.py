"""A run on nodes with memory of their own: one is drained, the one after it is lost; the weights, the
ledger and the metrics are those of the undisturbed run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.keepers import COPIES, PIECE_BYTES, Keepers
from controllers.ledger import LEDGER, first_difference
from hybridflow import run
from hybridflow.snapshots.memory import MemoryPlace
from tests.cluster.own_memory import Node, head, may_unshare, node_ids
from tests.recovery.test_killed_run import ROOT, events, numbers, settings, wait_for_step

pytestmark = pytest.mark.skipif(not may_unshare(), reason="needs mounts of its own")
OTHER = "other"
NUM_STEPS = 24
"""So many that the drain's command comes before the end."""


def write(directory: str, name: str, size: int) -> None:
    """On a node: a file of a snapshot, as a rank writes it."""
    path = Path(directory) / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parents[2].parent.chmod(0o700)
    path.write_bytes(bytes(range(256)) * (size // 256))


def sizes(directory: str) -> dict[str, int]:
    """On a node: the files below a directory."""
    files = Path(directory).rglob("*.safetensors")
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


@pytest.mark.slow
def test_keepers_copy_fetch_bring_and_free(tmp_path: Path) -> None:
    """Three nodes. Rank 0 is on the second, rank 1 on the head; the second is drained, then lost. The
    file is larger than a piece."""
    run_directory = Path("/dev/shm") / f"hybridflow-test-{os.getpid()}" / "run"
    first, second = (str(run_directory / name) for name in ("00000001.1", "00000002.1"))
    size = PIECE_BYTES + 256
    with head() as address:
        other, third = (Node(address, name, tmp_path / name) for name in (OTHER, "third"))
        (here,) = node_ids() - {other.node_id, third.node_id}

        def on(node: str, work: Any, *arguments: Any) -> Any:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(work).options(num_cpus=0, scheduling_strategy=strategy)
            return ray.get(task.remote(*arguments))

        def copied(directory: str, keep: list[str]) -> None:
            keepers.copy(Path(directory), list(map(Path, keep)))
            deadline = time.monotonic() + 60
            while keepers._is_copying():
                assert time.monotonic() < deadline
                time.sleep(0.05)

        try:
            on(other.node_id, write, first, "actor/0.safetensors", size)
            on(here, write, first, "actor/1.safetensors", 256)
            keepers = Keepers()
            copied(first, [first])
            every = [on(node, sizes, first) for node in (here, other.node_id, third.node_id)]
            assert sum(map(len, every)) == 4, "two files, each on two nodes"
            on(other.node_id, write, second, "actor/0.safetensors", size)
            other.drain(address, 60)
            deadline = time.monotonic() + 20
            while keepers.leaving() != {other.node_id}:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert keepers.here == here
            keepers.fetch(Path(second), {third.node_id})
            assert on(third.node_id, sizes, second) == {"actor/0.safetensors": size}
            other.lose()
            while other.node_id in node_ids():
                time.sleep(0.2)
            keepers.fetch(Path(first), {third.node_id, here})
            both = {"actor/0.safetensors": size, "actor/1.safetensors": 256}
            assert on(third.node_id, sizes, first) == on(here, sizes, first) == both
            keepers.bring(Path(first) / "actor", tmp_path / "disk", 60.0)
            whole = (tmp_path / "disk" / "0.safetensors").read_bytes()
            assert whole == bytes(range(256)) * (size // 256)
            keepers.free(run_directory, [Path(second)])
            assert not on(here, sizes, first) and not on(third.node_id, sizes, first)
            assert on(third.node_id, sizes, second) == {"actor/0.safetensors": size}
            keepers.free(run_directory, [])
            assert not on(third.node_id, sizes, second)
            keepers.close()
        finally:
            shutil.rmtree(run_directory.parent, ignore_errors=True)
            third.lose()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_drained_and_a_lost_node_cost_no_bit(tmp_path: Path) -> None:
    """FAULTS C3, drain notice and node lost: the policy's pool goes to another node, and its snapshot is
    taken from the drained node, then from a peer's memory; nothing is on disk yet."""
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    tiny = settings(tmp_path) | {"loop.num_steps": NUM_STEPS}
    disturbed.mkdir()
    with head() as address:
        nodes = [Node(address, OTHER, tmp_path / name) for name in ("one", "another")]
        pools = {
            "placement": "custom",
            "pools.policy.roles": "[actor,reference,reward]",
            "pools.policy.node_resource": OTHER,
            "pools.samples.roles": "[generation]",
            "cluster.address": address,
            "cluster.working_dir": "",
        }
        arguments = [f"{name}={value}" for name, value in (tiny | pools).items()]
        command = [sys.executable, "-m", "recipes.grpo", *arguments, f"output_dir={disturbed}"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with (disturbed / "log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, text=True, env=env
            )
        try:
            wait_for_step(process, disturbed, 1)
            (started,) = events(disturbed, "started")
            nodes.sort(key=lambda node: node.holds(started["pids"]["policy"]))
            lost, drained = nodes
            drained.drain(address, 60)
            step = len((disturbed / LEDGER).read_text().splitlines())
            wait_for_step(process, disturbed, step + 1)
            (recovered,) = events(disturbed, "recovered")
            assert recovered["source"] == "memory" and recovered["lost_steps"] <= 2
            assert lost.holds(recovered["pids"]["policy"])
            assert recovered["pids"]["samples"] == started["pids"]["samples"]
            place = MemoryPlace.of(disturbed)
            assert place is not None and list(place.directory.glob(f"*/{COPIES}"))
            lost.lose()
            drained.lose()
            replacement = Node(address, OTHER, tmp_path / "replacement.log")
            status = process.wait(400)
            last = events(disturbed, "recovered")[-1]
        finally:
            process.terminate()
            process.wait(100)
        assert status == 0, (disturbed / "log").read_text()[-3000:]
        assert not place.directory.exists()
        replacement.lose()
    assert last["source"] == "memory" and last["lost_steps"] <= 2
    kinds = [failure["kind"] for failure in events(disturbed, "failure")]
    assert kinds == ["node_lost", "died"]
    run("grpo", {**tiny, "output_dir": whole, "runtime": "local"})
    assert first_difference(whole / LEDGER, disturbed / LEDGER) is None
    assert numbers(disturbed) == numbers(whole)
