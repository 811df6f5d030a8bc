"""Engine vllm on prompts with images: against the trainer after syncs of changed weights, and against
engine hf (SCALE.md 5.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridflow import open_session
from tests.images.rewards import by_length
from tests.images.runs import settings
from workers.generation.vllm.images import image_begins

CASES: list[Any] = [("qwen2_5_vl", "trained")]
for _family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
    for _vision in ("trained", "frozen"):
        if (_family, _vision) not in CASES:
            CASES.append(pytest.param(_family, _vision, marks=pytest.mark.slow))


@pytest.mark.parametrize(("family", "vision"), CASES)
def test_grpo(tmp_path: Path, family: str, vision: str) -> None:
    """Three steps, of which two generate with weights that were trained: decoder and tower."""
    changes = {
        "output_dir": tmp_path / "out",
        "actor.generation.engine": "vllm",
        "actor.train.vision": vision,
    }
    with open_session("grpo", settings(tmp_path, family) | changes, reward=by_length) as session:
        for _ in range(3):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < 1e-5
            assert metrics["actor/grad_norm"] > 0


def test_places_of_images() -> None:
    """A token of that kind behind the images was sampled; too few are refused."""
    prompt = np.array([1, 9, 9, 2, 9, 3, 9])
    assert image_begins(prompt, 9, [2, 1]) == [1, 4]
    with pytest.raises(ValueError, match="4 image tokens and 2 images of 5 tokens"):
        image_begins(prompt, 9, [2, 3])
    with pytest.raises(ValueError, match="do not follow each other"):
        image_begins(prompt, 9, [3])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tower_in_tensor_parts(
    ray_cluster: None, tmp_path: Path, family: str, engine: str
) -> None:
    """Two training ranks send decoder and tower to a vLLM that is split over both; DeepSpeed's have a
    part of every weight (ZeRO-3)."""
    changes = {
        "output_dir": tmp_path / "out",
        "runtime": "ray",
        "cluster.address": "local",
        "num_devices": 2,
        "actor.generation.engine": "vllm",
        "actor.generation.tp": 2,
        "actor.train.engine": engine,
    }
    if engine == "deepspeed":
        changes["actor.train.zero_stage"] = 3
    with open_session("grpo", settings(tmp_path, family) | changes, reward=by_length) as session:
        for _ in range(3):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < 1e-5
            assert metrics["actor/grad_norm"] > 0
