"""Ending what a pool's processes leave behind on a node, and seeing that it is gone.

Processes are found by a token in their environment, which everything that they start inherits, so
that neither a reused process id nor a child that changed its parent or session matters.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

TOKEN = "HYBRIDFLOW_POOL"
"""Environment variable of a pool's hosts: a number of this start of the pool."""
POLL_S = 0.1
SAMPLE_S = 20.0
LISTING_S = 30.0
"""How long nvidia-smi may take, which waits for a driver that is stuck."""
ENDED = ("Z", "X")


def processes_of(token: str) -> list[int]:
    """The living processes of this node whose environment has the token, this one excepted."""
    mark = f"{TOKEN}={token}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            thread = _living_thread(entry)
            environment = (thread / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile, or another user's
        if mark in environment:
            pids.append(int(entry.name))
    return pids


def end_processes(token: str, device: str, within_s: float) -> list[str]:
    """Kills the processes with the token and waits until they are gone and hold no memory of a
    cuda device; says which are not within that time."""
    deadline = time.monotonic() + within_s
    killed: set[int] = set()
    while True:
        pids = processes_of(token)
        for pid in pids:
            _kill(pid)
        killed.update(pids)
        holders = [] if pids else _device_memory_of(killed, device)
        if not pids and not holders:
            return []
        if time.monotonic() > deadline:
            return [*map(_describe, pids), *holders]
        time.sleep(POLL_S)


def sample_stacks(token: str, rank: int) -> str:
    """The stacks of the processes with the token, as py-spy sees them from outside: for hosts that
    are not far enough to answer a signal."""
    command = shutil.which("py-spy")
    if command is None:
        return "(py-spy is not installed on this node)"
    texts = []
    for pid in processes_of(token):
        try:
            dump = subprocess.run(
                [command, "dump", "--nonblocking", "--pid", str(pid)],
                capture_output=True,
                text=True,
                timeout=SAMPLE_S,
            )
        except subprocess.TimeoutExpired:
            texts.append(f"{_describe(pid)} (py-spy did not answer)")
            continue
        texts.append(dump.stdout or f"{_describe(pid)} ({dump.stderr.strip()})")
    return "\n".join(texts) or f"(no process of rank {rank} was started on its node)"


def _living_thread(entry: Path) -> Path:
    """Where /proc has a thread of the process that has not ended. The first one may end before the
    others: while one of them waits for a driver, the process holds its devices' memory, and only what
    /proc has of that thread says so. A ProcessLookupError where all have ended."""
    for thread in sorted((entry / "task").iterdir(), key=lambda thread: int(thread.name)):
        if _state(thread) not in ENDED:
            return thread
    raise ProcessLookupError(entry.name)


def _state(entry: Path) -> str:
    """As /proc calls it: R, S, D (waits, for a driver perhaps, and can't be ended), ..."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ENDED[0]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _describe(pid: int) -> str:
    try:
        thread = _living_thread(Path(f"/proc/{pid}"))
        command = (thread / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return f"pid {pid}"
    return f"pid {pid} (state {_state(thread)}) {command[:100].strip()}"


def _device_memory_of(pids: set[int], device: str) -> list[str]:
    """In words: the memory of this node's GPUs that these processes still hold."""
    command = shutil.which("nvidia-smi")
    if device != "cuda" or command is None:
        return []
    try:
        listing = subprocess.run(
            [command, "--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=LISTING_S,
        )
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {LISTING_S:.0f} s"]
    holders = []
    for line in listing.stdout.splitlines():
        pid, _, memory = line.partition(",")
        if pid.strip().isdigit() and int(pid) in pids:
            holders.append(f"pid {pid} still holds {memory.strip()} of a device")
    return holders
