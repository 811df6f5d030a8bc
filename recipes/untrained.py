"""check_untrained(): whether a role that is not trained has settings that training alone reads."""

from __future__ import annotations

from workers.config import TrainConfig, VisionTraining


def check_untrained(role: str, config: TrainConfig) -> None:
    """Nothing is set that training alone reads of an adapter or a vision tower."""
    if config.lora.rank:
        raise ValueError(
            f"{role}.train.lora.rank is {config.lora.rank}, but {role} is not trained; leave it "
            f"out, or set {role}.train.lora.adapter to the directory of an adapter"
        )
    if config.vision is not VisionTraining.trained:
        raise ValueError(
            f"{role}.train.vision is {config.vision.value}, but {role} is not trained; leave it out"
        )
