"""check_image_layout(): whether an engine in its layout takes a model that sees images. Known from
settings and the model's configuration."""

from __future__ import annotations

from transformers import PretrainedConfig

from workers.config import TrainConfig
from workers.engines import ENGINES, engine_class
from workers.images import family_of


def check_image_layout(model: PretrainedConfig, train: TrainConfig) -> None:
    """A ValueError for what splits a vision tower; nothing for a model without one."""
    if family_of(model) is None:
        return
    if not engine_class(train.engine).sees_images:
        usable = [name for name in ENGINES.builtin if engine_class(name).sees_images]
        raise ValueError(
            f"train.engine is {train.engine!r}, which takes no model that sees images "
            f"({model.model_type}); use {' or '.join(usable)}"
        )
    for name, size in (("tp", train.tp), ("cp", train.cp), ("ep", train.ep)):
        if size > 1:
            raise ValueError(
                f"train.{name} is {size}, which splits no model that sees images "
                f"({model.model_type}) yet; set {name}=1"
            )
