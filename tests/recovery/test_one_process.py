"""Runs in one process, killed at any of their operations on files and at any moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_life_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """Those with most to lose: a multiplier and text of their own, rows drawn ahead in further rounds,
    pairs."""
    command = [sys.executable, "-m", "benchmarks.chaos.one_process", "--runs", "3"]
    command += ["--directory", str(tmp_path), "--cases", "safe_rlhf", "drain dapo", "dpo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert '"runs": 9, "equal": 9' in done.stdout
