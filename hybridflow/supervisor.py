"""The supervisor: a small process that starts a run's controller again when that dies or freezes.

`python -m recipes.ppo ...` becomes it (supervision.py); it imports neither torch nor Ray. It ends
everything that a dead controller leaves behind, Ray's processes included, which come to it because
it is a sub-reaper. It decides by the budget of recovery/budget.py and ends with the exit status of
the last controller. Signals: Ctrl-C and SIGTERM go to the controller, and nothing is started again
after them.

The control directory, which both sides share:

    heartbeat    touched by every wait of the controller; stale: it is frozen
    state.json   what the controller noted for its successor, and whether its end is the run's end
    stacks       the controller's stacks, by faulthandler
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hybridflow.failures import EventLog
from hybridflow.recovery.budget import Budget, after_exit
from hybridflow.recovery.events import Failure, Kind

CONTROL = "HYBRIDFLOW_CONTROL"
SUPERVISOR = "HYBRIDFLOW_SUPERVISOR"
"""Environment variables of a restarted controller: the control directory, the supervisor's process."""
HEARTBEAT, STATE, STACKS = "heartbeat", "state.json", "stacks"
STATE_BYTES = 4096
"""The size of state.json, which is written over in place: that takes no room on a full disk, and a
write of one page is not cut off by a signal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 1.0
STACKS_S = 3.0
LEAVE_S = 60.0
"""How long a controller may take to end after SIGTERM."""
END_S = 30.0


def become_subreaper() -> None:
    """Processes below this one whose parent dies become its children."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def read_state(directory: Path) -> dict[str, Any]:
    path = directory / STATE
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return state


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    text = json.dumps(dict(state)).encode().ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES, "state.json holds a few numbers"
    descriptor = os.open(directory / STATE, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, text, 0)
    finally:
        os.close(descriptor)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    below = list(children.get(pid, ()))
    for process in below:
        below += children.get(process, ())
    return below


def end_descendants() -> None:
    """Kills every process below this one and waits until they are gone."""
    deadline = time.monotonic() + END_S
    while (pids := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap()
        time.sleep(0.02)


def reap() -> dict[int, int]:
    """The exit statuses of the children that have ended, by process id; negative: a signal."""
    statuses: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return statuses
        if pid == 0:
            return statuses
        statuses[pid] = os.waitstatus_to_exitcode(status)


@dataclass(kw_only=True)
class Supervisor:
    """Supervisor(control=..., pid=4711, max_restarts=3, stale_s=2700.0, output_dir="outputs/ppo",
    command=["python", "-m", "recipes.ppo", ...]).run()"""

    control: str
    pid: int
    """The controller's."""
    max_restarts: int
    stale_s: float
    """How old the heartbeat may get."""
    output_dir: str
    command: list[str]
    leaving_since: float = 0.0
    """When a signal told the run to end; 0: it goes on."""
    interrupted: bool = False
    frozen: str = ""
    """Why the controller was killed from here."""
    events: EventLog | None = None
    """Holds what a full disk has refused so far."""

    def run(self) -> NoReturn:
        become_subreaper()
        directory = Path(self.control)
        budget = Budget(max_restarts=self.max_restarts)
        while True:
            status = self.watch()
            state = read_state(directory)
            furthest = state.get("furthest", -1)
            budget = budget.progressed(furthest)
            # The controller counts its own restarts on, from those that it was started with.
            budget = replace(budget, restarts=state.get("restarts", budget.restarts))
            budget, refusal = after_exit(budget, status, furthest=furthest)
            is_final = state.get("final", False) or bool(self.leaving_since)
            if is_final or refusal:
                break
            end_descendants()
            self.report(
                status,
                state,
                f"it is started again ({budget.restarts} of "
                f"{self.max_restarts} restarts without a new step)",
            )
            self.restart(budget)
        if status < 0 or self.leaving_since:
            end_descendants()
        if status < 0 and not self.leaving_since:
            self.report(status, state, refusal or "the run ends with it")
        shutil.rmtree(directory, ignore_errors=True)
        self.leave(status)

    def watch(self) -> int:
        """The controller's exit status; negative: the signal that ended it."""
        self.frozen, beaten, silent_s, seen = "", 0.0, 0.0, time.monotonic()
        heartbeat = Path(self.control) / HEARTBEAT
        while True:
            info = signal.sigtimedwait(SIGNALS, POLL_S)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self.forward(info)
            status = reap().get(self.pid)
            if status is not None:
                return status
            if self.events is not None:
                self.events.flush()
            # Time in which this process was stopped itself, by Ctrl-Z, does not count.
            now = time.monotonic()
            silent_s, seen = silent_s + min(now - seen, 2 * POLL_S), now
            latest = heartbeat.stat().st_mtime if heartbeat.exists() else 0.0
            if latest != beaten or not latest:
                beaten, silent_s = latest, 0.0
            if silent_s > self.stale_s and not self.frozen:
                self.kill_frozen(silent_s)
            if self.leaving_since and now - self.leaving_since > LEAVE_S:
                os.kill(self.pid, signal.SIGKILL)

    def forward(self, info: signal.struct_siginfo) -> None:
        """Passes a signal on, unless it came from the terminal, which sends it to the controller
        as well."""
        self.leaving_since = self.leaving_since or time.monotonic()
        self.interrupted |= info.si_signo == signal.SIGINT
        if info.si_code <= 0:  # sent by a process, not by the kernel
            os.kill(self.pid, info.si_signo)

    def kill_frozen(self, silent_s: float) -> None:
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(STACKS_S)
        stacks = Path(self.control) / STACKS
        text = stacks.read_text() if stacks.exists() else ""
        self.frozen = f"no sign of life for {silent_s:.0f} s\n{text}"
        os.kill(self.pid, signal.SIGKILL)

    def report(self, status: int, state: dict[str, Any], then: str) -> None:
        """Says on stderr and in events.jsonl what became of the controller."""
        cause = f"ended with status {status}"
        if status < 0:
            cause = f"was killed by {signal.Signals(-status).name}"
        if self.frozen:
            cause = self.frozen.partition("\n")[0]
        failure = Failure(
            kind=Kind.hung if self.frozen else Kind.died,
            role="controller",
            cause=cause,
            step=state.get("furthest", -1) + 1,
        )
        self.events = self.events or EventLog(Path(self.output_dir))
        if self.events.path.parent.is_dir():
            self.events.write("failure", **asdict(failure), evidence=self.frozen, then=then)
        with suppress(OSError):  # the log may be on a full disk
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # a killed progress display leaves the cursor hidden
            print(f"the controller {cause}; {then}", file=sys.stderr)

    def restart(self, budget: Budget) -> None:
        for name in (HEARTBEAT, STACKS):
            (Path(self.control) / name).unlink(missing_ok=True)
        state = read_state(Path(self.control)) | {"restarts": budget.restarts, "again": True}
        write_state(Path(self.control), state)
        environment = os.environ | {CONTROL: self.control, SUPERVISOR: str(os.getpid())}
        process = subprocess.Popen(self.command, env=environment)
        self.pid = process.pid
        process.returncode = 0  # it is waited for here, not by subprocess

    def leave(self, status: int) -> NoReturn:
        """Ends as the controller did."""
        sys.stdout.flush()
        sys.stderr.flush()
        if status == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    Supervisor(**json.loads(sys.argv[1])).run()
