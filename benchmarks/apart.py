"""Runs of this system and of TRL, each in a process of its own, TRL's by an interpreter that has
it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybridflow.devices import preloaded_allocator

HYBRIDFLOW, TRL = "hybridflow", "trl"


def has_trl(python: str) -> bool:
    """Whether that interpreter imports trl; asks it."""
    importing = subprocess.run([python, "-c", "import trl"], capture_output=True, check=False)
    if importing.returncode:
        print(f"{python} has no trl: this system is measured alone")
    return importing.returncode == 0


def run_apart(system: str, module: str, case: str, trl_python: str) -> dict[str, Any]:
    """What `python -m module CASE OUTPUT` writes as JSON; a RuntimeError with the end of its output
    where it fails."""
    python = trl_python if system == TRL else sys.executable
    allocator = preloaded_allocator() if system == TRL else {}  # the one that our hosts have
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        finished = subprocess.run(
            [python, "-m", module, case, str(output)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **allocator},
        )
        if finished.returncode:
            raise RuntimeError(
                f"{module} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
            )
        result: dict[str, Any] = json.loads(output.read_text())
    return result
