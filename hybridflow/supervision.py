"""A controller's side of its supervisor (supervisor.py): becoming its child, signs of life, and what
it has to know when it starts the controller again.

    supervise("outputs/ppo", max_restarts=3, stale_s=2700.0)     # from here on this is the child
    SUPERVISION.note(furthest=12)                                # what the next controller builds on

Without a supervisor (the Python API, recovery.max_restarts=0) everything here does nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridflow.recovery.actions import Exit
from hybridflow.supervisor import (
    CONTROL,
    HEARTBEAT,
    SIGNALS,
    STACKS,
    SUPERVISOR,
    become_subreaper,
    end_descendants,
    read_state,
    write_state,
)
from hybridflow.waiting import CALLS, nothing

PR_SET_PDEATHSIG = 1
BEAT_S = 0.5


class Supervision:
    """The control directory that a controller shares with its supervisor; None without one."""

    def __init__(self) -> None:
        self.directory: Path | None = None
        self._supervisor = 0
        self._state: dict[str, Any] = {}
        self._beaten = 0.0
        self.on_leave: Callable[[], None] = nothing
        """Called before a SIGTERM ends the controller; it has seconds."""

    def join(self, directory: Path, supervisor: int) -> None:
        """Makes this process the supervised controller of that process."""
        self.directory, self._supervisor = directory, supervisor
        self._state = read_state(directory)
        # Where the supervisor is killed, the controller does not outlive it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        self.handle_signals()
        if self.is_orphan:  # it was killed while this process was loading
            os.kill(os.getpid(), signal.SIGTERM)
        # What came meanwhile is handled now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        file = (directory / STACKS).open("a")
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        CALLS.beat = self.beat

    def handle_signals(self) -> None:
        """Ray's start puts a handler of its own in place; this puts ours back."""
        if self.directory is not None:
            signal.signal(signal.SIGTERM, leave_at_once)

    @property
    def is_orphan(self) -> bool:
        """Whether the supervisor has ended."""
        return self.directory is not None and os.getppid() != self._supervisor

    @property
    def state(self) -> dict[str, Any]:
        """What this controller and those before it noted."""
        return dict(self._state)

    @property
    def took_over(self) -> bool:
        """Whether this controller goes on with the work of one that died."""
        return bool(self._state.get("again"))

    def note(self, **values: Any) -> None:
        if self.directory is None:
            return
        self._state |= values
        write_state(self.directory, self._state)

    def beat(self) -> None:
        """A sign of life; from the first one on the supervisor expects them."""
        now = time.monotonic()
        if self.directory is None or now - self._beaten < BEAT_S:
            return
        self._beaten = now
        (self.directory / HEARTBEAT).touch()

    def pause(self) -> None:
        """No signs of life are expected until the next beat."""
        if self.directory is not None:
            (self.directory / HEARTBEAT).unlink(missing_ok=True)

    def mark_final(self) -> None:
        """This controller's end is the run's end, whatever its exit status."""
        self.note(final=True)


SUPERVISION = Supervision()


def supervise(output_dir: str, *, max_restarts: int, stale_s: float) -> None:
    """Returns in the supervised controller. In a new run that is a child of this process, which
    becomes the supervisor: a small Python of its own, with neither torch nor Ray in it."""
    control = os.environ.pop(CONTROL, "")
    if control:
        SUPERVISION.join(Path(control), int(os.environ.pop(SUPERVISOR)))
        return
    directory = Path(tempfile.mkdtemp(prefix="hybridflow-supervisor-"))
    write_state(directory, {})
    sys.stdout.flush()
    sys.stderr.flush()
    become_subreaper()  # already now: the controller may die before the supervisor stands
    # A signal that comes before the supervisor looks at signals waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    supervisor, pid = os.getpid(), os.fork()
    if pid == 0:
        SUPERVISION.join(directory, supervisor)
        return
    settings = {
        "control": str(directory),
        "pid": pid,
        "max_restarts": max_restarts,
        "stale_s": stale_s,
        "output_dir": str(Path(output_dir).absolute()),
        "command": [sys.executable, *sys.orig_argv[1:]],
    }
    module = ["-m", "hybridflow.supervisor", json.dumps(settings)]
    os.execv(sys.executable, [sys.executable, *module])


def leave_at_once(signum: int, frame: object) -> None:
    """SIGTERM: a notice that this machine or job ends. No step is waited for: the newest snapshot
    in memory is written to disk. The processes of an embedded cluster end with the controller."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    SUPERVISION.mark_final()
    try:
        SUPERVISION.on_leave()
    except Exception as error:  # the process ends here
        print(f"the last snapshot could not be written to disk: {error}", file=sys.stderr)
    end_descendants()
    if SUPERVISION.is_orphan and SUPERVISION.directory is not None:
        shutil.rmtree(SUPERVISION.directory, ignore_errors=True)
    os._exit(Exit.preempted)
