"""Settings of recipes.grpo on the tiny model with images, in this process."""

from __future__ import annotations

from pathlib import Path

from tests.images.tiny import make_data, make_model


def settings(directory: Path, family: str = "qwen2_5_vl") -> dict[str, object]:
    return {
        "runtime": "local",
        "model.path": make_model(directory / "model", family=family),
        "data.train": make_data(directory / "prompts.jsonl", rows=8),
        "data.batch_size": 8,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-2,
        "metrics.tensorboard": False,
    }
