"""A cluster of its own: `ray start --head`, `ray job submit`, actors by name, Prometheus, and a
driver that joins by address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.tiny import make_data, make_model

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    env: dict[str, str]
    port: int
    metrics_port: int

    def ray(self, *arguments: str, timeout: float = 240) -> str:
        """What the ray command prints (its own messages go to stderr); its exit status must be
        0."""
        run = subprocess.run(
            [str(BIN / "ray"), *arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout or run.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Short: Ray's sockets lie below, and a socket's path must stay under 108 characters.
    home = Path(tempfile.mkdtemp(prefix="hf", dir="/tmp"))
    port, dashboard, agent, metrics = free_ports(4)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "HOME": str(home),  # its own token in ~/.ray
        "PATH": f"{BIN}:{env['PATH']}",  # a job's `python` is the one that the head finds first
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "NO_COLOR": "1",
    }
    subprocess.run(
        [str(BIN / "ray"), "get-auth-token", "--generate"],
        env=env,
        check=True,
        capture_output=True,
        timeout=240,
    )
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=4",
        f"--temp-dir={home / 'ray'}",
        "--disable-usage-stats",
        "--object-store-memory=200000000",
        '--system-config={"metrics_report_interval_ms": 500, "prestart_worker_first_driver": false}',
    ]
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(
            lambda: (
                "Ray runtime started" in (home / "head.log").read_text()
                or process.poll() is not None
            ),
            240,
        )
        assert process.poll() is None, (home / "head.log").read_text()
        yield Head(env, port, metrics)
    finally:
        process.terminate()
        try:
            process.wait(40)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.3)


def status(head: Head) -> str:
    """Of the job, over HTTP: each `ray job status` would be seconds of a core."""
    token = (Path(head.env["HOME"]) / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(
        f"{head.env['RAY_API_SERVER_ADDRESS']}/api/jobs/first",
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["status"])


def ended(head: Head) -> bool:
    return status(head) not in ("PENDING", "RUNNING")


def gauges(head: Head) -> dict[str, float]:
    """The run's gauges, as Prometheus reads them."""
    text = (
        urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=10)
        .read()
        .decode()
    )
    samples = (
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    )
    return {
        sample.name: sample.value
        for sample in samples
        if sample.labels.get("run") == "job" and not sample.name.endswith("train_step")
    }


def test_a_submitted_recipe_runs_to_its_end_under_readable_names_and_shows_its_metrics(
    head: Head, tmp_path: Path
) -> None:
    """Its second step waits until the first one's metrics and the actors' names were seen."""
    model, gate = make_model(tmp_path / "model", layers=1), tmp_path / "gate"
    data = gated_data(tmp_path / "prompts.jsonl", gate)
    command = [
        "python",
        "-m",
        "recipes.grpo",
        f"model.path={model}",
        f"data.train={data}",
        "data.batch_size=4",
        "data.shuffle=false",
        "num_devices=2",
        "reward.function=tests.runtime.rewards:gated",
        "actor.train.precision=fp32",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.generation.sampling.max_response_tokens=8",
        "algorithm.samples_per_prompt=2",
        "loop.num_steps=2",
        "metrics.prometheus=true",
        "metrics.run=job",
        f"output_dir={tmp_path / 'out'}",
    ]
    head.ray(
        "job",
        "submit",
        "--working-dir",
        ".",
        "--no-wait",
        "--submission-id",
        "first",
        "--",
        *command,
    )
    expected = {
        "ray_hybridflow_train_reward_mean",
        "ray_hybridflow_train_actor_grad_norm",
        "ray_hybridflow_train_seconds_step",
    }
    wait_until(
        lambda: expected <= set(gauges(head)) or ended(head),
        400,
    )
    assert expected <= set(gauges(head)), head.ray("job", "logs", "first")

    actors = json.loads(head.ray("list", "actors", "--format", "json"))
    names = sorted(
        actor["name"].split(" (job ")[0] for actor in actors if actor["state"] == "ALIVE"
    )
    assert {"main/0 actor+reward", "main/1 actor+reward"} <= set(names)

    gate.touch()

    wait_until(lambda: ended(head), 400)
    logs = head.ray("job", "logs", "first")
    assert status(head) == "SUCCEEDED", logs
    assert "step 2/2 | reward/mean" in logs
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (
        tmp_path / "out" / "checkpoints" / "step-00000002" / "huggingface" / "model.safetensors"
    ).exists()


def gated_data(path: Path, gate: Path) -> Path:
    """Prompts of two steps; those of the second name the gate."""
    rows = map(json.loads, make_data(path, rows=8).read_text().splitlines())
    lines = []
    for number, row in enumerate(rows):
        lines.append(json.dumps(row | {"gate": str(gate) if number >= 4 else ""}) + "\n")
    path.write_text("".join(lines))
    return path


JOIN = """
import sys, ray
from cluster.connect import ClusterConfig, connect
with connect(ClusterConfig(address=sys.argv[1]), cpu_slots=2) as cluster:
    where = ray.get(ray.remote(lambda: __import__("hybridflow").__file__).remote())
    print(cluster.mode, cluster.num_cpu_slots, cluster.dashboard, where)
"""


def test_a_driver_joins_by_address_and_brings_its_directory(head: Head) -> None:
    arguments = [sys.executable, "-c", JOIN, f"127.0.0.1:{head.port}"]
    env = {
        name: value
        for name, value in head.env.items()
        if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    }
    run = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    mode, slots, dashboard, where = run.stdout.split()
    assert (mode, slots, dashboard) == ("address", "4.0", head.env["RAY_API_SERVER_ADDRESS"])
    assert where.startswith(f"{head.env['HOME']}/ray")


def test_without_the_token_nobody_gets_in(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.env['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
