"""python -m benchmarks.gpu takes what is installed; a run of it on a CPU goes through the same code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.installed import check_needed, describe
from benchmarks.gpu.runs import attempted, cases, finished, rows_of, write
from recipes.overrides import check_names
from workers.generation.vllm.build import installed_kind

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_those_of_the_installed_vllm_and_of_settings_that_exist(device: str) -> None:
    names = [case.name for case in cases(device)]
    assert {"fsdp hf bf16", "threed hf fp32"} <= set(names)
    assert ("fsdp vllm bf16" in names) is (installed_kind() == device)
    for case in cases(device):
        check_names(case.settings())


def test_the_first_line_says_what_is_missing() -> None:
    """Stage F on a machine with torch, transformers, hydra-core and pyarrow alone."""

    def bare(module: str) -> object:
        return None if module in ("ray", "deepspeed", "vllm") else module

    assert describe("cuda", "", bare) == (
        "missing: deepspeed, ray, vllm; without engine deepspeed, generation by vLLM: "
        "runs engines fsdp, threed with generation by hf"
    )
    assert "missing: vllm for cuda (installed: the build for cpu)" in describe("cuda", "cpu", str)
    assert describe("cuda", "cuda", str) == (
        "nothing is missing; runs engines fsdp, threed, deepspeed with generation by hf, vllm"
    )
    check_needed(bare)
    with pytest.raises(SystemExit, match=r"^missing: hydra-core, pyarrow; .* hydra-core pyarrow\)"):
        check_needed(lambda module: None if module in ("hydra", "pyarrow") else module)


PARENT = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""


def test_a_case_that_takes_too_long_leaves_no_process(tmp_path: Path) -> None:
    """Ray's or vLLM's would keep the device's memory from the next case."""
    noted = tmp_path / "pid"
    row, _ = finished("slow", [sys.executable, "-c", PARENT, str(noted)], 3.0)
    assert row == {"case": "slow", "error": "not finished within 3 s"}
    child = Path(f"/proc/{noted.read_text()}")
    deadline = time.monotonic() + 10
    while child.exists() and "zombie" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_case_that_fails_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    def failing() -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    row = attempted("large", failing)
    assert row == {"case": "large", "error": "OutOfMemoryError: CUDA out of memory"}
    silent, text = finished("silent", [sys.executable, "-c", "pass"], 60.0)
    assert "error" not in silent and text == ""
    died, _ = finished("died", [sys.executable, "-c", "import os; os._exit(9)"], 60.0)
    assert died["error"] == "ended with status 9"
    file = tmp_path / "rows.json"
    assert rows_of(None) == rows_of(file) == []
    write(file, {"runs": [row, {"case": "small"}]})
    assert rows_of(file) == [{"case": "small"}] and len(list(tmp_path.iterdir())) == 1
    file.write_text('{"runs": [')
    with pytest.raises(SystemExit, match=r"^--json is .* no file of this script's .*name another$"):
        rows_of(file)
    with pytest.raises(SystemExit, match="whose directory does not exist; make it"):
        rows_of(tmp_path / "missing" / "rows.json")


@pytest.mark.slow
def test_a_run_on_a_cpu(tmp_path: Path) -> None:
    run_script("cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    """G45."""
    run_script("cuda", tmp_path)


def run_script(device: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--steps", "1"]
    output = tmp_path / "rows.json"
    subprocess.run(
        [*command, "--only", "fsdp hf fp32", "--json", str(output)],
        cwd=ROOT,
        check=True,
        timeout=800,
    )
    (row,) = json.loads(output.read_text())["runs"]
    assert "error" not in row and row["tokens_per_s"] > 0
    assert row["last_step"]["actor/grad_norm"] > 0, "the next sync brings changed weights"
