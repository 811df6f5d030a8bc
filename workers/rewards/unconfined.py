"""Programs without a sandbox (reward.sandbox=off): limits on time, memory, files, and output, in an
empty directory, without this process' environment.

A program runs as the same user: it can read what that user can read, write where that user can
write, and with the right means get around the limits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workers.rewards.sandbox.processes import OUTPUT_BYTES, Limits, kill, waited_s

LAUNCHER = Path(__file__).with_name("code_launcher.py")
START_S = 1.0
"""Seconds for starting Python itself."""


def run(program: str, stdin: str, limits: Limits) -> tuple[bool, str]:
    """Whether the program ended by itself with status 0, and what it wrote on stdout."""
    with tempfile.TemporaryDirectory(prefix="program-") as directory:
        source = Path(directory) / "program.py"
        source.write_text(program, encoding="utf-8", errors="backslashreplace")
        environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "LANG": "C.UTF-8"}
        environment["OMP_NUM_THREADS"] = "1"
        # The launcher tells on a pipe that the limits are set, and closes it: the program can't.
        ready, tell = os.pipe()
        with (
            os.fdopen(ready, "rb") as limited,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as written,
        ):
            given.write(stdin.encode("utf-8", "backslashreplace"))
            given.seek(0)
            try:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", str(LAUNCHER), str(source)),
                        *(str(limits.timeout_s), str(limits.memory_mb), str(tell)),
                    ],
                    cwd=directory,
                    env=environment,
                    stdin=given,
                    stdout=written,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(tell,),
                )
            except OSError as error:
                raise RuntimeError(f"a program can't be started here: {error}") from error
            finally:
                os.close(tell)
            try:
                status = wait_for(process, limits.timeout_s + START_S)
            finally:
                kill(process)
            if not limited.read():
                raise RuntimeError(
                    "a program can't be started here, or its limits can't be set (setrlimit)"
                )
            written.seek(0)
            return status == 0, written.read(OUTPUT_BYTES).decode("utf-8", "replace")


def wait_for(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Its exit status; that of a killed process after timeout_s, in which the time that it waited
    for a busy processor does not count: it is not the program's fault."""
    started = time.monotonic()
    left = timeout_s
    while left > 0:
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            left = timeout_s + waited_s(process.pid) - (time.monotonic() - started)
    return -signal.SIGKILL
