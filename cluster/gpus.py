"""The GPUs of this machine, without Ray and without a CUDA context."""

from __future__ import annotations

import csv
import shutil
import subprocess

TIMEOUT_S = 30.0


def gpus() -> tuple[tuple[str, int], ...]:
    """Name and memory (bytes; 0 where it is not told, as of a GPU that has the host's) of this
    machine's GPUs, whatever this process is shown of them; no CUDA context is made."""
    return parse_gpus(_asked("name,memory.total"))


def divided_gpus() -> tuple[str, ...]:
    """Names of the GPUs that MIG divides: a process gets a slice, and gpus() tells the whole one's
    memory."""
    return parse_divided(_asked("name,mig.mode.current"))


def driver() -> str:
    """Version of this machine's NVIDIA driver; "missing" where there is none."""
    lines = _asked("driver_version").split()
    return lines[0] if lines else "missing"


def parse_gpus(text: str) -> tuple[tuple[str, int], ...]:
    """nvidia-smi's lines "NVIDIA H200, 143771" (MiB), or "NVIDIA GB10, [N/A]"."""
    devices = []
    for name, mebibytes in csv.reader(text.splitlines()):
        size = mebibytes.strip()
        devices.append((name.strip(), int(size) * 2**20 if size.isdigit() else 0))
    return tuple(devices)


def parse_divided(text: str) -> tuple[str, ...]:
    """nvidia-smi's lines "NVIDIA H200, Enabled", or "NVIDIA L4, [N/A]"."""
    return tuple(
        name.strip() for name, mode in csv.reader(text.splitlines()) if mode.strip() == "Enabled"
    )


def _asked(fields: str) -> str:
    """nvidia-smi's lines for these fields; "" where it is missing, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ""
    return run.stdout if run.returncode == 0 else ""
