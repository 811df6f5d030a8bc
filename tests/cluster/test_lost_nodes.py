"""A run on nodes with memory of their own: one is drained, the one after it is lost; the weights, the
ledger and the metrics are those of the undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.keepers import COPIES
from controllers.ledger import LEDGER, first_difference
from hybridflow import run
from hybridflow.snapshots.memory import MemoryPlace
from tests.cluster.own_memory import Node, head, may_unshare
from tests.recovery.test_killed_run import NUM_STEPS, ROOT, events, numbers, settings, wait_for_step

pytestmark = pytest.mark.skipif(not may_unshare(), reason="needs mounts of its own")
OTHER = "other"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_drained_and_a_lost_node_cost_no_bit(tmp_path: Path) -> None:
    """FAULTS C3, drain notice and node lost: the policy's pool goes to another node, and its snapshot is
    taken from the drained node, then from a peer's memory; nothing is on disk yet."""
    whole, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    tiny = settings(tmp_path) | {"loop.num_steps": NUM_STEPS + 2}
    disturbed.mkdir()
    with head() as address:
        drained = Node(address, OTHER, tmp_path / "drained.log")
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
            assert drained.holds(started["pids"]["policy"])
            lost = Node(address, OTHER, tmp_path / "lost.log")
            drained.drain(address, 60)
            step = len((disturbed / LEDGER).read_text().splitlines())
            wait_for_step(process, disturbed, step + 1)
            (recovered,) = events(disturbed, "recovered")
            assert recovered["source"] == "memory" and recovered["lost_steps"] == 1
            assert lost.holds(recovered["pids"]["policy"])
            assert recovered["pids"]["samples"] == started["pids"]["samples"]
            drained.lose()
            place = MemoryPlace.of(disturbed)
            assert place is not None and list(place.directory.glob(f"*/{COPIES}"))
            lost.lose()
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
