"""Peak bytes of training steps, counted on a hollow GPU, beside the mapper's footprint (docs/gpu.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.rehearsal.__main__ import run_memory
from benchmarks.rehearsal.memory_cases import LAYERS
from tests.matrix import matrix

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine"
)
QUICK = [("7B on 8", 2)]
LARGEST_ERROR = 0.15


def name(case: tuple[str, int]) -> str:
    return f"{case[0]}, {case[1]} layers"


@pytest.mark.parametrize("case", matrix(QUICK, LAYERS.items()), ids=name)
def test_the_mapper_predicts_the_peak(tmp_path: Path, case: tuple[str, int]) -> None:
    """G12, G15, G18: a whole float32 gradient, a whole model on its way, whole logits."""
    row = run_memory(tmp_path, *case)
    between_steps = row["predicted_resident_bytes"] / row["resident_bytes"]
    assert abs(between_steps - 1) < LARGEST_ERROR, row
    assert abs(row["predicted_bytes"] / row["peak_bytes"] - 1) < LARGEST_ERROR, row
