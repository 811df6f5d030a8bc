"""Rows of the task: a coloured shape on a grey ground, and the name of its colour.

The demonstrations of the warm start name any colour, so that it teaches the form of an answer and
nothing about images: what the model sees it learns by reinforcement.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from recipes.shapes.model import PATCH, make_model

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 40, 230),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
QUESTION = "what color is the shape"
WORDS = (*QUESTION.split(), *COLORS)
SIDE = 4 * PATCH
NUM_TRAIN, NUM_TEST = 512, 128


def draw(random_: random.Random, color: tuple[int, int, int]) -> Image.Image:
    """A shape of any kind, size and place on a ground of any grey."""
    ground = random_.randrange(0, 120)
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    size = random_.randrange(SIDE // 2, SIDE - 4)
    left, top = random_.randrange(SIDE - size), random_.randrange(SIDE - size)
    box = (left, top, left + size, top + size)
    pencil = ImageDraw.Draw(image)
    shape = random_.choice(SHAPES)
    if shape == "circle":
        pencil.ellipse(box, fill=color)
    elif shape == "square":
        pencil.rectangle(box, fill=color)
    else:
        pencil.polygon(
            [(left, top + size), (left + size, top + size), (left + size // 2, top)], color
        )
    return image


def reward(*, response: str, answer: str, **columns: Any) -> float:
    """1 for the name of the colour alone."""
    return float(response.strip() == answer)


def prepare(directory: Path, *, seed: int = 0) -> dict[str, str]:
    """Makes DIRECTORY/model, images/, train.jsonl, test.jsonl and demonstrations.jsonl; the settings of
    recipes.grpo that name them."""
    random_ = random.Random(seed)
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    make_model(directory / "model", WORDS, seed=seed)
    for name, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        rows, demonstrations = [], []
        for number in range(count):
            answer = random_.choice(list(COLORS))
            file = f"images/{name}-{number}.png"
            draw(random_, COLORS[answer]).save(directory / file)
            content = [{"type": "image", "image": file}, {"type": "text", "text": QUESTION}]
            row: dict[str, Any] = {"prompt": [{"role": "user", "content": content}]}
            rows.append(json.dumps({**row, "answer": answer}))
            guess = random_.choice(list(COLORS))
            demonstrations.append(json.dumps({**row, "response": guess}))
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        if name == "train":
            (directory / "demonstrations.jsonl").write_text("\n".join(demonstrations) + "\n")
    return {
        "model.path": str(directory / "model"),
        "data.train": str(directory / "train.jsonl"),
        "data.validation": str(directory / "test.jsonl"),
    }


def warm_start_settings(directory: Path) -> dict[str, Any]:
    """Those of recipes.sft, whose output is DIRECTORY/warm."""
    return {
        "model.path": str(directory / "model"),
        "data.train": str(directory / "demonstrations.jsonl"),
        "data.batch_size": 64,
        "policy.train.precision": "fp32",
        "policy.train.optimizer.learning_rate": 3e-3,
        "output_dir": str(directory / "warm"),
        "metrics.tensorboard": False,
    }


def settings() -> dict[str, Any]:
    """Those of recipes.grpo besides model and data."""
    return {
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 2,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 2e-3,
        "data.batch_size": 32,
        "algorithm.samples_per_prompt": 8,
        "metrics.tensorboard": False,
    }
