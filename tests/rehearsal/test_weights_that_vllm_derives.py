"""G6: matrices that vLLM derives from weights after loading follow every sync, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal import latent_case

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_absorbed_matrices_of_latent_attention_follow_the_weights(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", latent_case.__name__, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    # They are views of kv_b_proj's memory, until that is replaced by the trainer's.
    assert result["views"] == 0
    assert result["shared"] > 0.001
    assert result["committed"] == 0
