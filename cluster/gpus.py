"""The GPUs of this machine, without Ray and without a CUDA context."""

from __future__ import annotations

import csv
import shutil
import subprocess


def gpus() -> tuple[tuple[str, int], ...]:
    """Name and memory (bytes) of this machine's GPUs, whatever this process is shown of them; no
    CUDA context is made."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return parse_gpus(run.stdout) if run.returncode == 0 else ()


def driver() -> str:
    """Version of this machine's NVIDIA driver; "missing" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return "missing"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    lines = run.stdout.split()
    return lines[0] if run.returncode == 0 and lines else "missing"


def parse_gpus(text: str) -> tuple[tuple[str, int], ...]:
    """nvidia-smi's lines "NVIDIA H200, 143771" (MiB)."""
    devices = []
    for name, mebibytes in csv.reader(text.splitlines()):
        devices.append((name.strip(), int(mebibytes) * 2**20))
    return tuple(devices)
