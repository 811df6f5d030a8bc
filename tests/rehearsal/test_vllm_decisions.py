"""Stage C of the rehearsal: what vLLM decides on GPUs that are not there (docs/gpu.md)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import matrix

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("g++") is None, reason="no C and C++ compiler"
)
Question = tuple[str, tuple[str, ...]]
QUICK: list[Question] = [("H100", ("dense", "latent with experts"))]
SLOW: list[Question] = [(gpu, ()) for gpu in ("A100", "L4", "H100", "B200")]


def decisions(directory: Path, gpu: str, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.rehearsal.decisions", str(directory), gpu, *cases]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=800
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return rows


@pytest.mark.parametrize("question", matrix(QUICK, SLOW), ids=lambda question: question[0])
def test_what_our_settings_lead_to(question: Question, tmp_path: Path) -> None:
    peers, *rows = decisions(tmp_path, *question)
    check_peers(peers)
    assert rows
    for row in rows:
        check(row)


def check_peers(peers: dict[str, Any]) -> None:
    """G1: with one visible GPU, looking for peers fails, so that custom all-reduce must be off."""
    assert peers["3"] == "IndexError: list index out of range"
    assert peers["0,1,2,3,4,5,6,7"] is True
    assert peers["custom_all_reduce"] is False
    assert peers["nvlink"] is (peers["gpu"] != "L4")


def check(row: dict[str, Any]) -> None:
    if "latent" in row["model"] and row["precision"] == "fp32":
        # Refused before the start (workers/generation/vllm/limits.py).
        assert "No valid attention backend" in row["error"], row
        return
    assert not row["error"], row
    eager = row["model"].endswith("eager")
    assert (row["graphs"] == "NONE") is eager, row  # G31
    assert bool(row["captured_sizes"]) is not eager, row
    assert row["sleeps"] is (row["precision"] == "bf16" and not eager), row  # G11: cumem
    assert row["attention"] and row["block_size"] % 16 == 0, row
    if row["precision"] == "fp32":  # G4: the kernels that TRITON_F32_DEFAULT reaches
        assert all("TRITON" in name for name in row["attention"]), row
    if "experts" in row["model"]:  # G8: kernels that leave the weights where loaders put them
        assert row["experts"] == "TRITON", row
    # G5, G6: a sync writes the memory that was captured, and knows where every weight lies.
    assert not row["reshaped"] and not row["replaced"] and row["staged"] == 0, row
