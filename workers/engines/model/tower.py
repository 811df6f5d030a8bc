"""The parts of a model that sees images: a decoder, and beside it a vision tower.

For a model without images all of these say that everything is decoder. What the parts read is in
vision.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig, PreTrainedModel

from workers.engines.model.tensor_collectives import SliceTime
from workers.images import family_of

DECODER = "language_model"
"""transformers' name of the decoder beside a vision tower."""
FEATURES, FEATURE_PLACES = "deepstack_visual_embeds", "visual_pos_masks"
"""Keyword arguments of a decoder whose first layers add features of the tower (Qwen3-VL): [image
tokens, hidden] for each of them, and bool [rows, time]."""


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that reads embedded tokens: all but the head, or what stands beside a vision
    tower there."""
    base: Any = model.base_model
    if family_of(model.config) is not None:
        base = base.get_submodule(DECODER)
    assert isinstance(base, PreTrainedModel)
    return base


def num_fed_layers(config: PretrainedConfig) -> int:
    """Layers of the decoder, from the first on, that add features of the vision tower."""
    if family_of(config) is None:
        return 0
    return len(config.to_dict()["vision_config"].get("deepstack_visual_indexes") or ())


def split_features(model: PreTrainedModel, group: ProcessGroup) -> None:
    """Give the first layers this tensor rank's part of the features that they add, as their
    activations are parts of the time."""

    def split(
        _module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        places = options.get(FEATURE_PLACES)
        if places is None:
            return args, options
        local = places.chunk(group.size(), dim=1)[group.rank()]
        parts = []
        for features in options[FEATURES]:
            whole = features.new_zeros(*places.shape, features.shape[-1])
            whole = whole.masked_scatter(places[..., None], features)
            parts.append(SliceTime.apply(whole, group)[local])
        return args, {**options, FEATURE_PLACES: local, FEATURES: parts}

    if num_fed_layers(model.config):
        decoder_of(model).register_forward_pre_hook(split, with_kwargs=True)


def drop_tower(model: PreTrainedModel) -> None:
    """Leave the decoder alone; nothing for a model without images."""
    family = family_of(model.config)
    for name in () if family is None else family.tower:
        setattr(model.base_model, name, nn.Identity())


def freeze_tower(model: PreTrainedModel) -> None:
    """Train the decoder and its head alone: neither the tower nor its projector. Nothing for a model
    without images."""
    family = family_of(model.config)
    if family is not None:
        for name in family.tower:
            model.base_model.get_submodule(name).requires_grad_(False)


def in_tower(model: PreTrainedModel, name: str) -> bool:
    """Whether a module or parameter of the model, by its name, is outside the decoder and its head."""
    family = family_of(model.config)
    towers = () if family is None else family.tower
    return any(name.startswith(f"{model.base_model_prefix}.{tower}.") for tower in towers)


def tower_parameters(model: PreTrainedModel) -> int:
    """Parameters outside the decoder and its head; 0 for a model without images. May be on meta."""
    family = family_of(model.config)
    total = 0
    for name in () if family is None else family.tower:
        for parameter in model.base_model.get_submodule(name).parameters():
            total += parameter.numel()
    return total
