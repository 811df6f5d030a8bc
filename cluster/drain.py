"""Tells the runs on this machine that it ends, and waits until they have left.

    python -m cluster.drain --wait 90               # all runs of this user; root: all runs
    python -m cluster.drain --run outputs/ppo       # one run, by its output_dir

Sends SIGTERM to the runs' supervisors (hybridflow/supervisor.py); each run then writes its newest
snapshot to disk and ends with status 75. For everything that ends a machine without telling its
processes, such as a pod that is removed (its preStop hook). Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SUPERVISOR = ("-m", "hybridflow.supervisor")
POLL_S = 0.2


def supervisors(run: str = "") -> list[int]:
    """Process ids of the supervisors that this process can see; `run`: the output_dir of one."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # gone meanwhile
        if tuple(command[1:3]) != SUPERVISOR:
            continue
        if not run or json.loads(command[3])["output_dir"] == str(Path(run).absolute()):
            pids.append(int(entry.name))
    return sorted(pids)


def drain(wait_s: float, run: str = "") -> list[int]:
    """Those that are still there after `wait_s` seconds."""
    left = []
    for pid in supervisors(run):
        with suppress(ProcessLookupError, PermissionError):  # gone meanwhile; another user's
            os.kill(pid, signal.SIGTERM)
            left.append(pid)
    deadline = time.monotonic() + wait_s
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = sorted(set(left) & set(supervisors(run)))
    return left


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.drain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--wait", type=float, default=90.0, help="seconds; default: 90")
    parser.add_argument("--run", default="", help="the output_dir of a run; default: all runs")
    options = parser.parse_args()
    left = drain(options.wait, options.run)
    if left:
        sys.exit(f"still running: {', '.join(map(str, left))}")


if __name__ == "__main__":
    main()
