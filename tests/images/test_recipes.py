"""Recipes on a tiny model with images: in this process, and on Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from hybridflow import open_session
from tests.images.rewards import by_length
from tests.images.runs import settings
from tests.images.tiny import make_data, png, square

EXACT = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return settings(tmp_path_factory.mktemp("recipes"))


def test_grpo(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Log-probs of the trainer are the generator's after every sync of changed weights, of rows with
    none to three images; what is saved is a model with its image processor."""
    with open_session("grpo", tiny | {"output_dir": tmp_path}, reward=by_length) as session:
        for _ in range(3):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < EXACT
            assert metrics["actor/grad_norm"] > 0
        session.save(tmp_path / "saved")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")


def test_ppo_has_a_critic_with_a_head_of_its_own(tiny: dict[str, Any], tmp_path: Path) -> None:
    changes = {"output_dir": tmp_path, "critic.train.precision": "fp32"}
    with open_session("ppo", tiny | changes, reward=by_length) as session:
        for _ in range(2):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < EXACT
            assert metrics["critic/grad_norm"] > 0


@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward_model"])
def test_recipes_on_given_rows(tiny: dict[str, Any], tmp_path: Path, recipe: str) -> None:
    """Losses fall on rows with images."""
    (tmp_path / "cat.png").write_bytes(png(square("red", 56, 84)))
    lines = []
    for answer, other in (("red", "green"), ("one", "two")) * 2:
        content = [{"type": "image"}, {"type": "text", "text": "what color"}]
        row = {"prompt": [{"role": "user", "content": content}], "images": ["cat.png"]}
        lines.append(json.dumps({**row, "response": answer, "chosen": answer, "rejected": other}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    role = "reward_model" if recipe == "reward_model" else "policy"
    given = {
        "runtime": "local",
        "model.path": tiny["model.path"],
        "data.train": tmp_path / "rows.jsonl",
        "data.batch_size": 4,
        f"{role}.train.precision": "fp32",
        f"{role}.train.optimizer.learning_rate": 1e-2,
        "metrics.tensorboard": False,
        "output_dir": tmp_path / "out",
    }
    with open_session(recipe, given) as session:
        losses = [session.step()[f"{role}/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_refusals_of_gemma(tmp_path: Path) -> None:
    """vLLM is given no images of Gemma 3, and kernels without masks and ranks that share a row can't show
    an image to itself."""
    given = settings(tmp_path, "gemma3") | {"output_dir": tmp_path / "out"}
    for changes, problem in (
        (
            {"actor.generation.engine": "vllm"},
            "is 'vllm', which is given no images of a model like",
        ),
        (
            {"model.attention": "flash_attention_2", "actor.train.packing": False},
            "the tokens of an image can't see each other",
        ),
        (
            {"actor.train.cp": 2, "num_devices": 2, "runtime": "ray"},
            "train.cp is 2, but the tokens of an image of gemma3 see each other",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            open_session("grpo", given | changes, reward=by_length)


@pytest.mark.slow
def test_on_ray(ray_cluster: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Two data ranks, of which one has prompts without images at times: the numbers of one process;
    images travel as references."""
    few = make_data(tmp_path / "prompts.jsonl", rows=4)
    common = tiny | {"data.train": few, "data.batch_size": 4}
    runs = []
    for place in (
        {"runtime": "local"},
        {"runtime": "ray", "num_devices": 2, "cluster.address": "local"},
    ):
        output = tmp_path / str(place["runtime"])
        with open_session("grpo", common | place | {"output_dir": output}, reward=by_length) as run:
            runs.append([run.step() for _ in range(2)])
    for alone, both in zip(*runs, strict=True):
        for name in ("reward/mean", "actor/loss", "actor/grad_norm"):
            assert both[name] == pytest.approx(alone[name], abs=1e-5, rel=2e-5), name
        assert both["actor/log_prob_gap_max"] < EXACT
