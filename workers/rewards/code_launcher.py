"""python -I code_launcher.py program.py TIMEOUT_S MEMORY_MB PIPE: runs a program under limits;
writes a byte into the pipe once they are set.

A file of its own because limits that are set between fork and exec are not safe in a process with
threads. Imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import runpy
import sys

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Flags of Linux' unshare: a name space of users, and one of networks, which has none."""


def limit(timeout_s: float, memory_mb: int) -> None:
    limits = {
        resource.RLIMIT_CPU: math.ceil(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_FSIZE: 16 * 2**20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


def leave_network() -> None:
    """Where the kernel lets an ordinary user do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)


def main() -> None:
    program, timeout_s, memory_mb, pipe = sys.argv[1:]
    leave_network()
    limit(float(timeout_s), int(memory_mb))
    os.write(int(pipe), b"1")
    os.close(int(pipe))
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
