"""Every family of models with images, against its own forward in transformers, and its generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor

from controllers.data import DataConfig, PromptDataset
from hybridflow import open_session
from recipes.images import check_images
from recipes.preparation import prepare
from recipes.python_settings import make_settings
from recipes.roles import Role
from tests.images.plain import TEMPERATURE, load, make_rows, whole_log_probs
from tests.images.rewards import by_length
from tests.images.runs import settings
from tests.images.test_engine import make_engine
from tests.images.tiny import make_data, make_model, make_tokenizer, png, square
from tests.tiny import tiny_grpo
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import model_config
from workers.images import ImageProcessor, ImageReference
from workers.reward import ModelRewardWorker
from workers.role_config import RewardConfig
from workers.sequences import Sequences

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_transformers(world: None, tmp_path: Path, family: str) -> None:
    """Packed and unpacked rows with none, one and two images (SCALE.md 5.4)."""
    path = make_model(tmp_path / family, family=family)
    sequences, plain = make_rows(path, sampled=False)
    model = load(path)
    with torch.no_grad():
        expected = torch.cat([whole_log_probs(model, inputs) for inputs in plain])
    for cut in ({}, {"share_prompts": False}, {"packing": False}):
        engine = make_engine(path, micro_batch_tokens=60, **cut)
        outputs = engine.forward(sequences, temperature=TEMPERATURE)
        assert outputs.log_probs is not None
        assert_close(outputs.log_probs, expected, rtol=0.0, atol=1e-6)


def test_images_behind_a_shared_prompt(world: None, tmp_path: Path) -> None:
    """Two rows that begin alike and go on with an image, whose tokens see each other and the prompt."""
    path = make_model(tmp_path / "gemma3", family="gemma3")
    tokenizer, processor = (
        make_tokenizer("gemma3"),
        AutoImageProcessor.from_pretrained(path, backend="pil"),
    )
    image_id = tokenizer.get_vocab()["<image_soft_token>"]
    prompt = tokenizer("user how many what<|im_end|>")["input_ids"]
    rows, plain = [], []
    for color, end in (("red", "color one"), ("red", "two")):
        text = f"<start_of_image>{'<image_soft_token>' * 16}<end_of_image>{end}"
        rest = tokenizer(text)["input_ids"]
        pixels = processor(images=[square(color, 56, 56)], return_tensors="pt")["pixel_values"]
        ids = torch.tensor([*prompt, *rest])
        types = (ids == image_id).long()[None]
        rows.append((ids, len(rest), ImageReference(encoded=png(square(color, 56, 56)))))
        plain.append(
            {"pixel_values": pixels, "types": types, "ids": ids[None], "scored": len(rest)}
        )
    sequences = Sequences(
        token_ids=torch.cat([ids for ids, _, _ in rows]),
        lengths=torch.tensor([len(ids) for ids, _, _ in rows]),
        scored_lengths=torch.tensor([scored for _, scored, _ in rows]),
        images=[(image,) for _, _, image in rows],
    )
    model = load(path)
    with torch.no_grad():
        expected = torch.cat([whole_log_probs(model, inputs) for inputs in plain])
    for shares in (True, False):
        engine = make_engine(path, share_prompts=shares, micro_batch_tokens=100)
        outputs = engine.forward(sequences, temperature=TEMPERATURE)
        assert outputs.log_probs is not None
        assert_close(outputs.log_probs, expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [
        "aya_vision",
        "glm4v",
        "glm4v_moe",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "paligemma",
        "smolvlm",
    ],
)
def test_other_families_are_refused(tmp_path: Path, family: str) -> None:
    """In one line that names the family and what to do, from the configuration alone."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"{family} sees images in a way that is not known"
    ) as error:
        model_config(ModelConfig(path=str(tmp_path)), Head.lm)
    assert "use a language model, or one that sees images of qwen2_vl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama4", "mllama", "gemma4", "qwen3_5"])
def test_families_that_are_given_text_alone(tmp_path: Path, model_path: Path, family: str) -> None:
    """Language models of these are known; where the data has images they are refused by name."""
    AutoConfig.for_model(family).save_pretrained(tmp_path / family)
    data = make_data(tmp_path / "rows.jsonl", rows=4)
    rows = PromptDataset.load(
        DataConfig(train=str(data)),
        str(data),
        make_tokenizer(),
        images=ImageProcessor(ModelConfig(path=str(model_path))),
    )
    config = RewardConfig(model=ModelConfig(path=str(tmp_path / family)))
    role = Role(name="reward", worker=ModelRewardWorker, config=config, pool="main")
    with pytest.raises(
        ValueError, match=f"whose family .{family}. is given text alone, and"
    ) as error:
        check_images([role], [rows], ModelConfig(path=str(model_path)))
    assert "use a model of one of qwen2_vl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_role_that_would_see_other_tokens(tmp_path: Path, model_path: Path) -> None:
    """Other sizes of images, in a family or from one to another, give an image other tokens: features
    would stand in some of the prompt's, and the rest would be read as text."""
    data = make_data(tmp_path / "rows.jsonl", rows=4)
    policy = ModelConfig(path=str(model_path))
    images = ImageProcessor(policy)
    rows = PromptDataset.load(
        DataConfig(train=str(data)), str(data), make_tokenizer(), images=images
    )

    def check(path: Path) -> None:
        config = RewardConfig(model=ModelConfig(path=str(path)))
        role = Role(name="reward", worker=ModelRewardWorker, config=config, pool="main")
        check_images([role], [rows], policy)

    same = make_model(tmp_path / "same", seed=1)
    check(same)
    file = same / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"longest_edge": 12544', '"longest_edge": 3136'))
    for path in (same, make_model(tmp_path / "qwen3_vl", family="qwen3_vl")):
        with pytest.raises(ValueError, match="would not be those of the prompts; use a") as error:
            check(path)
        assert "longest_edge 12544" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "actor.train.vision=frozen",
            r"actor: train\.vision is frozen, but qwen2 is trained on text",
        ),
        (
            "reference.train.vision=frozen",
            r"reference\.train\.vision is frozen, but reference is not",
        ),
    ],
)
def test_a_frozen_tower_of_what_has_none_or_is_not_trained(
    tmp_path: Path, setting: str, problem: str
) -> None:
    arguments = [f"{name}={value}" for name, value in tiny_grpo(tmp_path).items()]
    arguments += ["reward.function=tests.images.rewards:by_length", "actor.loss.kl_coefficient=0.1"]
    with pytest.raises(ValueError, match=problem) as error:
        prepare(make_settings("grpo", [*arguments, setting]))
    assert "leave it out" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_grpo(tmp_path: Path, family: str) -> None:
    """The generator's log-probs are the trainer's after syncs of changed weights."""
    given: dict[str, Any] = settings(tmp_path, family) | {"output_dir": tmp_path / "out"}
    with open_session("grpo", given, reward=by_length) as session:
        for _ in range(2):
            assert session.step()["actor/log_prob_gap_max"] < 1e-5
