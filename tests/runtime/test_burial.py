"""Processes of a pool end to their last thread, and a driver that is stuck is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridflow import burial

ONE_THREAD_LEFT = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def torn() -> Iterator[subprocess.Popen[str]]:
    """A process whose first thread has ended and whose second lives on."""
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_THREAD_LEFT],
        env={**os.environ, burial.TOKEN: "torn"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    status = Path(f"/proc/{process.pid}/stat")
    while status.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_process_is_there_until_its_last_thread_has_ended(torn: subprocess.Popen[str]) -> None:
    """Such a process holds what it had of a GPU: a thread of NCCL's may be the one that is left."""
    assert burial.processes_of("torn") == [torn.pid]
    assert burial.end_processes("torn", "cpu", 10.0) == []
    assert burial.processes_of("torn") == []
    assert torn.wait(10) == -9


def test_what_is_left_is_told_by_the_thread_that_lives(torn: subprocess.Popen[str]) -> None:
    said = burial._describe(torn.pid)
    assert said.startswith(f"pid {torn.pid} (state S) ") and "python" in said


def test_a_driver_that_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(burial, "LISTING_S", 0.2)
    assert burial.end_processes("nobody", "cuda", 0.1) == ["nvidia-smi did not answer within 0 s"]
