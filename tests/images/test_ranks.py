"""Two gloo ranks, of which one has no image, against one process (SCALE.md 5.4, finding T44)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.context import RankContext
from tests.images.ranks import ROWS, WORLD, run, two_steps
from tests.ranks import run_ranks
from workers.config import VisionTraining

CASES: list[dict[str, Any]] = [
    {},
    {"reshard_after_forward": True, "micro_batch_tokens": 40},
    {"vision": VisionTraining.frozen},
    {"packing": False},
]


def test_a_rank_without_images(world: None, model_path: Path, tmp_path: Path) -> None:
    """Nobody waits for it, and loss and gradient norm of two steps are those of one process: with
    one group of FSDP and with one for each layer, and with a frozen tower."""
    run_ranks(run, (tmp_path, model_path, CASES), WORLD)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for number, settings in enumerate(CASES):
        alone = two_steps(model_path, RankContext(), [*ROWS[0], *ROWS[1]], **settings)
        for results in both:
            for step in range(2):
                for name in ("loss", "grad_norm"):
                    expected = pytest.approx(alone[step][name], abs=2e-6, rel=1e-5)
                    assert results[number][step][name] == expected, (settings, step, name)
