"""The supervisor over a small program in place of a controller (FAULTS C5)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.supervisor import descendants, read_state, write_state

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from hybridflow.supervision import SUPERVISION, supervise

if sys.argv[2] == "loads slowly" and "HYBRIDFLOW_CONTROL" in os.environ:
    Path(sys.argv[1], "loading").touch()
    time.sleep(2)
# Where the tests run in the background, Ctrl-C is ignored, and so it would be here.
signal.signal(signal.SIGINT, signal.default_int_handler)
output, behaviour = Path(sys.argv[1]), sys.argv[2]
supervise(str(output), max_restarts=2, stale_s=float(sys.argv[3]))
life = SUPERVISION.state.get("life", 0) + 1
SUPERVISION.note(life=life)
with (output / "lives").open("a") as file:
    file.write(f"{life} {os.getpid()}\\n")
sleeper = [sys.executable, "-c", "import time; time.sleep(30)"]
nowhere = subprocess.DEVNULL
subprocess.Popen(sleeper, start_new_session=True, stdout=nowhere, stderr=nowhere)
SUPERVISION.beat()
%s
"""
BEHAVIOURS = {
    "dies twice": "os.kill(os.getpid(), signal.SIGKILL) if life < 3 else sys.exit(0)",
    "dies always": "os.kill(os.getpid(), signal.SIGKILL)",
    "dies with progress": (
        "SUPERVISION.note(furthest=life, restarts=0)\\n"
        "os.kill(os.getpid(), signal.SIGSEGV) if life < 5 else sys.exit(0)"
    ),
    "is wrong": "sys.exit(2)",
    "ends by itself": "SUPERVISION.mark_final(); sys.exit(1)",
    "fails": "sys.exit(1)",
    "freezes": "os.kill(os.getpid(), signal.SIGSTOP) if life < 2 else sys.exit(0)",
    "hangs": "time.sleep(600) if life < 2 else sys.exit(0)",
    "loads slowly": "os.kill(os.getpid(), signal.SIGKILL)",
    "goes on": "while True: time.sleep(0.1); SUPERVISION.beat()",
}


@pytest.fixture
def begin(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    def start(behaviour: str) -> subprocess.Popen[str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM % BEHAVIOURS[behaviour].replace("\\n", "\n"))
        stale_s = "2" if behaviour in ("freezes", "hangs") else "100"
        command = [sys.executable, str(program), str(tmp_path), behaviour, stale_s]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


def lives(directory: Path) -> list[tuple[int, int]]:
    """(number, process id) of every controller that began."""
    path = directory / "lives"
    if not path.exists():
        return []
    return [(int(line.split()[0]), int(line.split()[1])) for line in path.read_text().splitlines()]


def failures(directory: Path) -> list[dict[str, object]]:
    path = directory / "events.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def wait_for_life(directory: Path) -> int:
    deadline = time.monotonic() + 60
    while not lives(directory):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # it also starts its child and beats
    return lives(directory)[-1][1]


@pytest.mark.parametrize(
    ("behaviour", "status", "count"),
    [
        ("dies twice", 0, 3),
        ("dies always", 128 + signal.SIGKILL, 3),
        ("dies with progress", 0, 5),
        ("is wrong", 2, 1),
        ("ends by itself", 1, 1),
        ("fails", 1, 3),
        ("freezes", 0, 2),
        ("hangs", 0, 2),
    ],
)
def test_ends_are_told_apart(
    begin: Callable[[str], subprocess.Popen[str]],
    tmp_path: Path,
    behaviour: str,
    status: int,
    count: int,
) -> None:
    process = begin(behaviour)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == status, errors
    assert [life for life, _ in lives(tmp_path)] == list(range(1, count + 1))
    kinds = {failure["kind"] for failure in failures(tmp_path)}
    if count == 1:
        assert not kinds
    else:
        assert kinds == ({"hung"} if behaviour in ("freezes", "hangs") else {"died"})
    if behaviour == "hangs":
        assert "time.sleep" in str(failures(tmp_path)[0]["evidence"]) or "program.py" in str(
            failures(tmp_path)[0]["evidence"]
        )


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_the_run_and_all_its_processes(
    begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path, how: signal.Signals, status: int
) -> None:
    process = begin("goes on")
    wait_for_life(tmp_path)
    family = descendants(process.pid)
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert len(family) == 2 and len(lives(tmp_path)) == 1
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def test_all_descendants_of_a_killed_controller_end_at_once(
    begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The sub-reaper gets what a dead controller leaves behind, whatever session that is in."""
    process = begin("goes on")
    controller = wait_for_life(tmp_path)
    (sleeper,) = descendants(controller)
    os.kill(controller, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(lives(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not Path(f"/proc/{sleeper}").exists()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)


def test_a_killed_supervisor_takes_its_controller_along(
    begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = begin("goes on")
    controller = wait_for_life(tmp_path)
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while [pid for pid in family if Path(f"/proc/{pid}/cmdline").exists() and _alive(pid)]:
        assert time.monotonic() < deadline, (controller, family)
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_supervisor_that_ends_while_the_next_controller_loads(
    begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path, how: signal.Signals
) -> None:
    """A notice is a notice at that time too; and a controller whose supervisor died before it could
    ask the kernel for that news does not begin."""
    process = begin("loads slowly")
    deadline = time.monotonic() + 60
    while not (tmp_path / "loading").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = descendants(process.pid)
    (control,) = tmp_path.glob("hybridflow-supervisor-*")
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode == (75 if how is signal.SIGTERM else -how)
    while control.exists() or any(map(_alive, family)):
        assert time.monotonic() < deadline, (control, family)
        time.sleep(0.05)
    assert len(lives(tmp_path)) == 1


def test_what_a_controller_notes_takes_no_room(tmp_path: Path) -> None:
    """Nor does what the supervisor adds: a full disk for temporary files ends no run."""
    write_state(tmp_path, {})
    (before,) = [path.stat() for path in tmp_path.iterdir()]
    for number in (7, 12345678):
        write_state(tmp_path, {"furthest": number, "again": True})
        (after,) = [path.stat() for path in tmp_path.iterdir()]
        assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
        assert read_state(tmp_path) == {"furthest": number, "again": True}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
