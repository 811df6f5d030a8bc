"""Who holds a run: the process that an attempt was claimed by, for whoever starts the run again.

    attempts/<n>/holder.json     {"host": "node-1", "boot": "...", "pid": 4711, "began": "83120", ...}

Only a process that is certainly alive on this machine counts, one that is suspended (Ctrl-Z) too: it
holds its devices and its memory, and goes on when it is brought back. Of one on another machine
nothing is known here: a controller that lost contact is fenced by the next attempt (attempts.py).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridflow.recovery.attempts import DIRECTORY, Attempt, newest
from hybridflow.whole_file import whole_file

FILE = "holder.json"
BOOT = Path("/proc/sys/kernel/random/boot_id")
LOGGER = logging.getLogger(__name__)
ORPHAN_S, POLL_S = 60.0, 0.2
"""How long a process may take to end whose supervisor has."""
DEAD, SUSPENDED = ("Z", "X"), "T"
"""States of /proc/<pid>/stat."""


def hold(attempt: Attempt) -> None:
    """Notes this process as the attempt's."""
    with whole_file(_path(attempt)) as path:
        parent = _parent(os.getpid())
        path.write_text(json.dumps(_identity(os.getpid()) | {"parent": parent}))


def release(attempt: Attempt) -> None:
    """The process goes on without the run."""
    with suppress(OSError):
        _path(attempt).unlink(missing_ok=True)


def check_nobody_holds(output_dir: Path) -> None:
    """A ValueError where another process of this machine is training the run in `output_dir`. Waits
    for one that lost its parent: a controller whose supervisor was killed is about to end."""
    deadline = 0.0
    while (holder := _alive(output_dir)) is not None:
        pid = holder["pid"]
        group = _suspended_group(pid)
        if group:
            raise ValueError(
                f"output_dir={output_dir}: a suspended run is there (process {pid} on "
                f"{holder['host']}); bring it back (fg, or kill -CONT -- -{group}), to go on or to end "
                "it with Ctrl-C, or set another output_dir"
            )
        if holder["parent"] == _parent(pid) or (deadline and time.monotonic() > deadline):
            raise ValueError(
                f"output_dir={output_dir}: another run is alive there (process {pid} on "
                f"{holder['host']}); wait for it or end it (kill -INT {pid}), or set another output_dir"
            )
        if not deadline:
            LOGGER.warning("waiting for process %s, which still holds %s, to end", pid, output_dir)
            deadline = time.monotonic() + ORPHAN_S
        time.sleep(POLL_S)


def is_held(output_dir: Path) -> bool:
    """Whether another process of this machine has the run in `output_dir`."""
    return _alive(output_dir) is not None


def _alive(output_dir: Path) -> dict[str, Any] | None:
    """The other process that holds the newest attempt; None where there is none, or it is not known."""
    attempts = output_dir.absolute() / DIRECTORY
    try:
        holder: dict[str, Any] = json.loads((attempts / str(newest(attempts)) / FILE).read_text())
        others = {name: value for name, value in holder.items() if name != "parent"}
        pid = int(holder["pid"])
        return holder if pid != os.getpid() and others == _identity(pid) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(attempt: Attempt) -> Path:
    return attempt.directory / str(attempt.number) / FILE


def _identity(pid: int) -> dict[str, object]:
    """Tells a process that runs here from every other one, by the time that it began at from a later
    one of its number too; an OSError where there is none."""
    if _state(pid) in DEAD:
        raise ProcessLookupError(f"process {pid} does not run")
    return {
        "host": socket.gethostname(),
        "boot": BOOT.read_text().strip(),
        "namespace": str(Path("/proc/self/ns/pid").readlink()),
        "pid": pid,
        "began": _fields(pid)[19],
    }


def _state(pid: int) -> str:
    return _fields(pid)[0]


def _suspended_group(pid: int) -> str:
    """The process group of a process that is suspended, as Ctrl-Z does with a whole group; empty for
    one that runs or has ended."""
    try:
        state, _, group, *_ = _fields(pid)
    except OSError:
        return ""
    return group if state == SUSPENDED else ""


def _fields(pid: int) -> list[str]:
    """Those of /proc/<pid>/stat behind the name, from the process' state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> str:
    """Its process id; empty where the process has ended."""
    try:
        return _fields(pid)[1]
    except OSError:
        return ""
