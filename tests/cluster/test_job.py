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
from prometheus_client.samples import Sample

from hybridflow.metrics.vitals import VITALS
from tests.cluster.prometheus import INSTALLED, documented, panels, prometheus, wanted
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


def exposition(head: Head) -> list[Sample]:
    """Everything that the node serves, by Prometheus' parser."""
    url = f"http://127.0.0.1:{head.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    samples: list[Sample] = []
    for family in text_string_to_metric_families(text):
        samples += family.samples
    return samples


def gauges(head: Head) -> dict[str, float]:
    """The run's gauges."""
    result = {}
    for sample in exposition(head):
        if sample.labels.get("run") == "job":
            result[sample.name] = sample.value
    return result


@dataclass(frozen=True)
class Job:
    """A submitted recipe whose second step waits for a file."""

    output: Path
    gate: Path


@pytest.fixture(scope="module")
def job(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Responses are drawn ahead in a pool of their own, so that no number of the dashboard is
    missing. Answers when its first step's metrics can be read."""
    directory = tmp_path_factory.mktemp("job")
    gate, output = directory / "gate", directory / "out"
    data = gated_data(directory / "prompts.jsonl", gate)
    command = [
        "python",
        "-m",
        "recipes.grpo",
        f"model.path={make_model(directory / 'model', layers=1)}",
        f"data.train={data}",
        f"data.validation={gated_data(directory / 'held_out.jsonl', gate, free=8)}",
        "data.batch_size=4",
        "data.shuffle=false",
        "placement=custom",
        "pools.training.roles=[actor,reference,reward]",
        "pools.samples.roles=[generation]",
        "asynchrony.staleness=1",
        "actor.loss.rollout_correction.correction=truncate",
        "actor.loss.kl_coefficient=0.01",
        "reward.function=tests.runtime.rewards:gated",
        "actor.train.precision=fp32",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.generation.sampling.max_response_tokens=8",
        "algorithm.samples_per_prompt=2",
        "loop.num_steps=2",
        "metrics.prometheus=true",
        "metrics.run=job",
        f"output_dir={output}",
    ]
    options = ["--working-dir", ".", "--no-wait", "--submission-id", "first"]
    head.ray("job", "submit", *options, "--", *command)
    first = {"ray_hybridflow_train_reward_mean", "ray_hybridflow_run_staged_step"}
    wait_until(lambda: first <= set(gauges(head)) or ended(head), 400)
    assert not ended(head), head.ray("job", "logs", "first")
    return Job(output, gate)


def test_actors_have_readable_names(head: Head, job: Job) -> None:
    actors = json.loads(head.ray("list", "actors", "--format", "json"))
    names = {actor["name"].partition(" ")[0] for actor in actors if actor["state"] == "ALIVE"}
    assert {"training/0", "samples/0"} <= names


def test_every_metric_of_the_page_and_of_the_dashboard_is_served(head: Head, job: Job) -> None:
    """Without a Prometheus: what the node serves, against the names in docs/observability.md and the
    queries of grafana.json."""
    missing: list[str] = []

    def complete() -> bool:
        names = {sample.name for sample in exposition(head)}
        missing[:] = sorted(documented() - names)
        for title, query in panels().items():
            if not any(map(wanted(query).fullmatch, names)):
                missing.append(f"panel {title!r}")
        return not missing

    assert len(documented()) > len(VITALS)
    try:
        wait_until(complete, 30)
    except AssertionError:
        raise AssertionError(f"not served: {missing}") from None
    time.sleep(3)  # Ray forgets a gauge after two reports of a second each
    assert complete(), f"no longer served: {missing}"
    values = gauges(head)
    assert values["ray_hybridflow_train_step"] == values["ray_hybridflow_run_step"] == 1
    assert values["ray_hybridflow_run_starts"] == 1
    assert values["ray_hybridflow_run_failures"] == values["ray_hybridflow_run_recoveries"] == 0


@pytest.mark.skipif(not INSTALLED, reason="prometheus is not installed")
def test_a_real_prometheus_answers_every_panel(head: Head, job: Job, tmp_path: Path) -> None:
    """It finds the node by Ray's own list of endpoints."""
    endpoints = Path(head.env["HOME"]) / "ray" / "prom_metrics_service_discovery.json"
    (port,) = free_ports(1)
    silent: list[str] = []
    with prometheus(tmp_path, endpoints, port) as server:

        def answered() -> bool:
            silent[:] = []
            for title, query in panels().items():
                if not server.query(query.replace("$run", "job")):
                    silent.append(title)
            return not silent

        try:
            wait_until(answered, 60)
        except AssertionError:
            raise AssertionError(f"panels without an answer: {silent}") from None
        (step,) = server.query('ray_hybridflow_run_step{run="job"}')
        assert step["value"][1] == "1"


def test_a_submitted_recipe_runs_to_its_end(head: Head, job: Job) -> None:
    job.gate.touch()
    wait_until(lambda: ended(head), 400)
    logs = head.ray("job", "logs", "first")
    assert status(head) == "SUCCEEDED", logs
    assert "step 2/2 | reward/mean" in logs
    steps = []
    for line in (job.output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            steps.append(row["step"])
    assert steps == [1, 2]
    export = job.output / "checkpoints" / "step-00000002" / "huggingface"
    assert (export / "model.safetensors").exists()
    check_trace(job.output / "trace.json")


def check_trace(path: Path) -> None:
    """By the rules of the Trace Event format: a phase's own fields, numbers for ids, slices of a
    lane that nest, arrows from slice to slice, and names for all lanes."""
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    fields = {
        "X": {"name", "pid", "tid", "ts", "dur"},
        "M": {"name", "pid", "tid", "args"},
        "C": {"name", "pid", "ts", "args"},
        "i": {"name", "pid", "tid", "ts", "s", "args"},
        "s": {"name", "cat", "id", "pid", "tid", "ts"},
        "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
    }
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    named = set()
    for event in events:
        assert set(event) == fields[event["ph"]] | {"ph"}, event
        numbers = [event[name] for name in ("pid", "tid", "ts", "dur", "id") if name in event]
        assert all(isinstance(number, int) and number >= 0 for number in numbers), event
        if event["ph"] == "M" and event["name"] == "thread_name":
            named.add((event["pid"], event["tid"]))
        if event["ph"] == "X":
            lane = lanes.setdefault((event["pid"], event["tid"]), [])
            lane.append((event["ts"], event["ts"] + event["dur"]))
    assert named == set(lanes)
    for slices in lanes.values():
        open_until: list[int] = []
        for begin, end in sorted(slices, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], "slices of a lane nest"
            open_until.append(end)
    arrows = [event for event in events if event["ph"] in "sf"]
    assert arrows, "weights travelled between the pools"
    for arrow in arrows:
        spans = lanes[arrow["pid"], arrow["tid"]]
        assert any(begin <= arrow["ts"] <= end for begin, end in spans), arrow


def gated_data(path: Path, gate: Path, free: int = 4) -> Path:
    """Prompts of two steps; those behind the first `free` name the gate."""
    rows = map(json.loads, make_data(path, rows=8).read_text().splitlines())
    lines = []
    for number, row in enumerate(rows):
        lines.append(json.dumps(row | {"gate": str(gate) if number >= free else ""}) + "\n")
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
