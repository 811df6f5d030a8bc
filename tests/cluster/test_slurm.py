"""The Slurm script: with programs that stand for Slurm and Ray, and on a real Slurm of one node
where its daemons are installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "templates" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "scontrol", "squeue", "srun")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]

SRUN = """#!/usr/bin/env bash
# Drops its own options and runs the rest.
while [[ "$1" == -* ]]; do test "$1" != -w || shift; shift; done
exec "$@"
"""
PYTHON = """#!/usr/bin/env bash
# The count of nodes, once there is one, and the token.
case "$2" in *ray.nodes*) until test -s calls; do sleep 0.05; done; echo 1;; *) echo abc;; esac
"""
STAND_INS = {
    "srun": SRUN,
    "python": PYTHON,
    "hostname": "#!/bin/sh\necho 127.0.0.1\n",
    "ray": "#!/bin/sh\necho ray $@ >> calls\nexec sleep 60\n",
    "scancel": "#!/bin/sh\necho scancel $@ >> calls\nkill -TERM $(cat run-pid)\n",
    "scontrol": "#!/bin/sh\necho scontrol $@ >> calls\ntest $1 = requeue || echo localhost\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with programs that stand for Slurm's, Ray's and Python."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def start(checkout: Path, *command: str) -> subprocess.Popen[str]:
    env = os.environ | {
        "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
    }
    return subprocess.Popen(
        ["bash", SCRIPT, *command], env=env, stdout=subprocess.PIPE, text=True, cwd=checkout
    )


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_only_a_run_that_asks_for_it_is_put_back_into_the_queue(
    checkout: Path, status: int
) -> None:
    job = start(checkout, "bash", "-c", f"exit {status}")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    calls = (checkout / "calls").read_text().splitlines()
    assert ("scontrol requeue 7" in calls) is (status == 75)
    assert any(call.startswith("ray start --head --node-ip-address=127.0.0.1") for call in calls)


def test_a_signal_reaches_the_run_before_ray_ends(checkout: Path) -> None:
    """The run takes a second to leave, and Ray is still there when it does."""
    run = (
        "trap 'sleep 1; pgrep -f \"sleep 60\" > ray-pids; exit 75' TERM; echo $$ > run-pid; touch ready; "
        "while true; do sleep 0.1; done"
    )
    job = start(checkout, "bash", "-c", run)
    wait_for(checkout / "ready", 30)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output
    calls = (checkout / "calls").read_text()
    assert "scancel --signal=TERM 7.2\n" in calls, "steps 0 and 1 are hostname and Ray"
    assert "scontrol requeue 7" in calls
    assert (checkout / "ray-pids").read_text().strip()


def wait_for(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} is not there after {seconds:.0f} s"
        time.sleep(0.1)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [SCRIPT, *SCRIPT.parent.glob("*.sh")]
    check = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
PluginDir={plugins}
"""


@dataclass(frozen=True)
class Slurm:
    directory: Path
    env: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        for word in self.run("scontrol", "show", "job", job).split():
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        raise AssertionError(f"job {job} has no {name}")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    """A Slurm of this machine alone, with keys, ports and state of its own."""
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = (first.getsockname()[1], second.getsockname()[1])
    configuration = tmp_path / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    # Packages that were unpacked somewhere, rather than installed, have their plugins there.
    controller = Path(shutil.which("slurmctld") or "")
    (plugins,) = controller.parents[1].glob("lib/*/slurm-wlm")
    text = CONFIGURATION.format(
        host=host,
        ports=ports,
        directory=tmp_path,
        cpus=len(os.sched_getaffinity(0)),
        plugins=plugins,
    )
    configuration.write_text(text)
    munge = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={tmp_path / 'munge.socket'}",
        f"--pid-file={tmp_path / 'munge.pid'}",
        f"--log-file={tmp_path / 'munge.log'}",
        f"--seed-file={tmp_path / 'munge.seed'}",
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["SLURM_CONF"] = str(configuration)
    daemons = []
    try:
        steps = shutil.which("slurmstepd") or ""
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-d", steps]):
            log = (tmp_path / f"{command[0]}.out").open("w")
            daemons.append(
                subprocess.Popen(
                    command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
            time.sleep(1)
        cluster = Slurm(tmp_path, env)
        end = time.monotonic() + 60
        while "idle" not in cluster.run("sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < end, (tmp_path / "slurmd.log").read_text()[-3000:]
            time.sleep(1)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.slow
def test_a_real_slurm_requeues_a_run_that_had_to_leave_and_it_goes_on(
    slurm: Slurm, tmp_path: Path
) -> None:
    """The signal that comes before the time limit, sent by hand in the second of four steps: the
    run leaves with its newest snapshot, Slurm puts the job back, and it ends where it would have."""
    model, gate = make_model(tmp_path / "model", layers=1), tmp_path / "gate"
    rows = []
    for number in range(16):
        waits = str(gate) if number >= 4 else ""
        rows.append(json.dumps({"prompt": f"{number}+1=", "answer": "2", "gate": waits}) + "\n")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(rows))
    output = tmp_path / "out"
    command = [
        "python",
        "-m",
        "recipes.grpo",
        f"model.path={model}",
        f"data.train={data}",
        "data.batch_size=4",
        "data.shuffle=false",
        "reward.function=tests.runtime.rewards:gated",
        "actor.train.precision=fp32",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.generation.sampling.max_response_tokens=8",
        "algorithm.samples_per_prompt=2",
        "loop.num_steps=4",
        f"output_dir={output}",
    ]
    cpus = len(os.sched_getaffinity(0))
    options = ["--nodes=1", "--gpus-per-node=0", f"--cpus-per-task={cpus}", "--time=0:10:00"]
    log = tmp_path / "job.log"
    words = slurm.run("sbatch", *options, f"--output={log}", str(SCRIPT), *command).split()
    job = words[-1]
    wait_for(output / "metrics.jsonl", 180)
    end = time.monotonic() + 120
    while '"step": 1' not in (output / "metrics.jsonl").read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.5)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    while slurm.field(job, "Restarts") != "1":
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.5)
    gate.touch()
    end = time.monotonic() + 240
    while slurm.field(job, "JobState") != "PENDING":
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.5)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # not two minutes later
    while slurm.field(job, "JobState") != "COMPLETED":
        assert slurm.field(job, "JobState") != "FAILED", log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(1)
    steps = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        steps.append(json.loads(line)["step"])
    assert steps == [1, 2, 3, 4]
    assert "the run ended with status 75" in log.read_text()
