"""Engine fsdp on rows with images, against plain transformers on each row alone (SCALE.md 5.4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from hybridflow.context import RankContext
from tests.images.plain import TEMPERATURE, load, make_rows, row_log_probs
from tests.images.tiny import png, square
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig, VisionTraining
from workers.engines.base import Head, Outputs
from workers.engines.fsdp.engine import FsdpEngine
from workers.images import ImageProcessor, ImageReference
from workers.images.processor import rotary_positions
from workers.sequences import Sequences

EXACT = 1e-6
CUTS: list[dict[str, Any]] = [
    {"micro_batch_tokens": 1000},
    {"micro_batch_tokens": 30},
    {"share_prompts": False},
    {"packing": False},
    {"activation_checkpointing": True},
]


def make_engine(path: Path, head: Head = Head.lm, **settings: Any) -> FsdpEngine:
    optimizer = OptimizerConfig(learning_rate=5e-3, clip_grad_norm=0.0, epsilon=1e-3)
    config = TrainConfig(precision=Precision.fp32, optimizer=optimizer, **settings)
    model = ModelConfig(path=str(path), new_head=True)
    return FsdpEngine(model=model, config=config, head=head, context=RankContext())


def loss_fn(outputs: Outputs, rows: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
    assert outputs.log_probs is not None
    loss = (outputs.log_probs * rows.per_token["weights"]).sum()
    return loss, {}


@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_log_probs_are_those_of_each_row_alone(
    world: None, model_path: Path, settings: dict[str, Any]
) -> None:
    """Packed rows with none, one and two images of several sizes, prompts that are shared and prompts
    that differ in their image only (findings T45, T46)."""
    sequences, plain = make_rows(model_path)
    model = load(model_path)
    with torch.no_grad():
        expected = torch.cat([row_log_probs(model, inputs) for inputs in plain])
    outputs = make_engine(model_path, **settings).forward(sequences, temperature=TEMPERATURE)
    assert outputs.log_probs is not None
    assert_close(outputs.log_probs, expected, rtol=0.0, atol=EXACT)


def test_an_image_changes_the_answer(world: None, model_path: Path) -> None:
    """Prompts of equal tokens and other images do not share them."""
    sequences, _ = make_rows(model_path)
    two = sequences.rows([3, 3])
    assert two.images is not None
    (image,) = two.images[1]
    other = ImageReference(encoded=_inverted(image))
    engine = make_engine(model_path)
    alike = engine.forward(two).log_probs
    differ = engine.forward(replace(two, images=[two.images[0], (other,)])).log_probs
    assert alike is not None
    assert differ is not None
    half = len(alike) // 2
    assert torch.equal(alike[:half], alike[half:])
    assert (differ[:half] - differ[half:]).abs().max() > 1e-4


def _inverted(image: ImageReference) -> bytes:
    from PIL import ImageOps

    from tests.images.tiny import png

    return png(ImageOps.invert(image.read()))


@pytest.mark.parametrize("vision", list(VisionTraining))
def test_a_step_is_that_of_autograd(
    world: None, model_path: Path, vision: VisionTraining, tmp_path: Path
) -> None:
    """Loss, gradient norm and weights after a step, of the tower too; a frozen tower keeps its bits.
    transformers loads what is saved."""
    sequences, plain = make_rows(model_path)
    model = load(model_path)
    frozen = vision is VisionTraining.frozen
    if frozen:
        model.model.visual.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    log_probs = torch.cat([row_log_probs(model, inputs) for inputs in plain])
    loss = (log_probs * sequences.per_token["weights"]).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
    optimizer.step()
    engine = make_engine(model_path, vision=vision, micro_batch_tokens=40)
    metrics = engine.train_step(sequences, loss_fn, temperature=TEMPERATURE)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=EXACT)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    after = {shard.name: shard.shards[0].tensor for shard in engine.local_parameters()}
    for name, parameter in model.named_parameters():
        if frozen and "visual" in name:
            assert torch.equal(after[name], before[name]), name
        else:
            assert_close(after[name], parameter, rtol=0.0, atol=2e-5, msg=name)
    assert any(
        "visual" in name and not torch.equal(after[name], before[name]) for name in after
    ) != (frozen)
    engine.save_pretrained(tmp_path)
    read = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, value in after.items():
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("head", [Head.value, Head.score])
def test_critics_and_reward_models(world: None, model_path: Path, head: Head) -> None:
    """A model with images has no class with a score in transformers; its own is read at the same
    places, packed as alone."""
    sequences, _ = make_rows(model_path)
    engine = make_engine(model_path, head)
    whole, alone = engine.forward(sequences), []
    for row in range(sequences.num_rows):
        alone.append(engine.forward(sequences.rows([row])))
    name = "values" if head is Head.value else "scores"
    picked = [getattr(one, name) for one in alone]
    assert_close(getattr(whole, name), torch.cat(picked), rtol=0.0, atol=EXACT)
    assert len(torch.unique(torch.cat(picked))) > 3


def test_positions_are_those_of_transformers(model_path: Path) -> None:
    """Against get_rope_index, with text before, between and after images (finding T49)."""
    _, plain = make_rows(model_path)
    base: Any = load(model_path).model
    token = base.config.image_token_id
    for inputs in plain:
        if "image_grid_thw" not in inputs:
            continue
        expected, _ = base.get_rope_index(
            inputs["ids"],
            mm_token_type_ids=inputs["types"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        grids = list(map(tuple, inputs["image_grid_thw"].tolist()))
        assert torch.equal(rotary_positions(inputs["ids"][0], token, grids, 2), expected[:, 0])


def test_images_that_are_not_the_prompts_are_refused(world: None, model_path: Path) -> None:
    """Tokens without their images end the pass with an error, not with other numbers (T46)."""
    sequences, _ = make_rows(model_path)
    assert sequences.images is not None
    wrong = replace(sequences, images=[*sequences.images[1:], ()])
    with pytest.raises(ValueError, match="image tokens and"):
        make_engine(model_path).forward(wrong)


def test_images_of_fewer_tokens_than_the_prompts_are_refused(
    world: None, model_path: Path, tmp_path: Path
) -> None:
    """As from another processor, or of a file that changed: the tokens left over would be text. One that
    the policy sampled is."""
    sequences, _ = make_rows(model_path)
    assert sequences.images is not None
    engine = make_engine(model_path)
    row = sequences.rows([3])
    smaller = ImageReference(encoded=png(square("red", 28, 28)))
    token = ImageProcessor(ModelConfig(path=str(model_path))).token_id
    assert int((row.token_ids == token).sum()) > 1
    with pytest.raises(ValueError, match="image tokens and 1 images of 1 tokens"):
        engine.forward(replace(row, images=[(smaller,)]))
    ids = row.token_ids.clone()
    ids[-1] = token
    outputs = engine.forward(replace(row, token_ids=ids))
    assert outputs.log_probs is not None and outputs.log_probs.isfinite().all()


def test_pixels_are_kept_once(model_path: Path) -> None:
    """Equal images are processed once in a process (finding T47)."""
    sequences, _ = make_rows(model_path)
    processor = ImageProcessor(ModelConfig(path=str(model_path)))
    assert sequences.images is not None
    (first,), (second,) = sequences.images[3:5]
    assert first is not second
    assert processor.pixels(first) is processor.pixels(second)
