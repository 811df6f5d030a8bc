"""check_image_layout(): whether an engine in its layout takes a model that sees images. Known from
settings and the model's configuration."""

from __future__ import annotations

from transformers import PretrainedConfig

from workers.config import TrainConfig, VisionTraining
from workers.engines import ENGINES, engine_class
from workers.engines.model.loading import AUTO
from workers.engines.model.vision import MASKED_ATTENTIONS
from workers.images import family_of
from workers.images.families import FAMILIES


def check_image_layout(model: PretrainedConfig, train: TrainConfig, attention: str) -> None:
    """A ValueError for what takes no images, for a kernel (model.attention) that can't let an image's tokens
    see each other where they do, and for a frozen tower of a model that has none."""
    family = family_of(model)
    if family is None:
        if train.vision is VisionTraining.frozen:
            raise ValueError(
                f"train.vision is frozen, but {model.model_type} is trained on text alone and has no vision "
                f"tower here; leave it out, or use one of {', '.join(FAMILIES)}"
            )
        return
    if family.sees_itself and attention not in (AUTO, *MASKED_ATTENTIONS):
        raise ValueError(
            f"model.attention is {attention!r}, in which the tokens of an image can't see each other, as "
            f"those of {model.model_type} do; set model.attention=auto"
        )
    if not engine_class(train.engine).sees_images:
        usable = [name for name in ENGINES.builtin if engine_class(name).sees_images]
        raise ValueError(
            f"train.engine is {train.engine!r}, which takes no model that sees images "
            f"({model.model_type}); use {' or '.join(usable)}"
        )
    if family.sees_itself and train.cp > 1:
        raise ValueError(
            f"train.cp is {train.cp}, but the tokens of an image of {model.model_type} see each other, and "
            "ranks that share a row see what is before their own tokens; set cp=1"
        )
