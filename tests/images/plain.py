"""Rows with images, and what plain transformers makes of each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tests.images.tiny import make_tokenizer, png, square
from workers.images import ImageReference
from workers.sequences import Sequences

TEMPERATURE = 0.7
SIZES = [[], [(56, 56)], [(84, 56), (28, 112)], [(56, 84)], [(56, 84)], []]
"""Height and width of the images of each row; the fourth and fifth have the same one."""
ANSWERS = ["red", "one two", "blue", "green one", "how many red", "two"]
COLORS = ("red", "green", "blue")


def load(path: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )


def make_rows(path: Path, *, sampled: bool = True) -> tuple[Sequences, list[dict[str, Any]]]:
    """The rows as an engine reads them, and transformers' inputs of each. `sampled`: the third row's
    answer has a sampled image token."""
    family = AutoConfig.from_pretrained(path).model_type
    tokenizer = make_tokenizer(family)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    image = "<image_soft_token>" if family == "gemma3" else "<|image_pad|>"
    image_id = tokenizer.get_vocab()[image]
    ids, images, plain, scored = [], [], [], []
    for row, sizes in enumerate(SIZES):
        color = COLORS[row % 3] if row < 3 else "red"
        pictures = [square(color, *size) for size in sizes]
        text = "user "
        inputs: dict[str, Any] = {}
        if pictures:
            features = processor(images=pictures, return_tensors="pt")
            if family == "gemma3":
                inputs = {"pixel_values": features["pixel_values"]}
                text += f"<start_of_image>{image * 16}<end_of_image>" * len(pictures)
            else:
                inputs = {name: features[name] for name in ("pixel_values", "image_grid_thw")}
                for grid in features["image_grid_thw"]:
                    text += f"<|vision_start|>{image * int(grid.prod() // 4)}<|vision_end|>"
        prompt = tokenizer(text + "what color<|im_end|>assistant ")["input_ids"]
        answer = tokenizer(ANSWERS[row])["input_ids"]
        if sampled and row == 2:
            answer = [image_id, *answer]
        types = torch.tensor([[int(token == image_id) for token in prompt] + [0] * len(answer)])
        ids.append(torch.tensor([*prompt, *answer]))
        scored.append(len(answer))
        images.append(tuple(ImageReference(encoded=png(picture)) for picture in pictures))
        plain.append({**inputs, "types": types, "ids": ids[-1][None], "scored": len(answer)})
    total = sum(scored)
    generator = torch.Generator().manual_seed(1)
    sequences = Sequences(
        token_ids=torch.cat(ids),
        lengths=torch.tensor([len(row) for row in ids]),
        scored_lengths=torch.tensor(scored),
        images=images,
        per_token={"weights": torch.randn(total, generator=generator) / total},
    )
    return sequences, plain


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[tokens, hidden] of one row: images merged and positions computed by transformers, from inputs
    whose sampled image token is embedded as text."""
    base: Any = model.model
    embedded = base.get_input_embeddings()(inputs["ids"])
    positions = None
    if "pixel_values" in inputs:
        grid = inputs["image_grid_thw"]
        features = torch.cat(base.get_image_features(inputs["pixel_values"], grid).pooler_output)
        mask = inputs["types"].bool()[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(mask, features)
        positions, _ = base.get_rope_index(
            inputs["ids"], mm_token_type_ids=inputs["types"], image_grid_thw=grid
        )
    output = base.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    return output.last_hidden_state[0]


def row_log_probs(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[scored tokens]"""
    hidden = hidden_states(model, inputs)
    log_probs = (model.lm_head(hidden)[:-1] / TEMPERATURE).log_softmax(-1)
    ids, scored = inputs["ids"][0], inputs["scored"]
    return log_probs.gather(1, ids[1:, None])[-scored:, 0]


def whole_log_probs(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[scored tokens] by the model's own forward alone, of a row without a sampled image token."""
    arguments = {name: inputs[name] for name in inputs if name not in ("types", "ids", "scored")}
    if arguments:
        gemma = model.config.model_type == "gemma3"
        arguments["token_type_ids" if gemma else "mm_token_type_ids"] = inputs["types"]
    logits = model(input_ids=inputs["ids"], use_cache=False, **arguments).logits[0, :-1]
    log_probs = (logits / TEMPERATURE).log_softmax(-1)
    return log_probs.gather(1, inputs["ids"][0, 1:, None])[-inputs["scored"] :, 0]
