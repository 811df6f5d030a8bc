"""Parameters as transformers computes with them, and as its files store them.

A family of mixtures of experts has one file entry for each matrix of each expert; transformers stacks
them in memory, [experts, ...], gate and up together. Other systems read the files' names. transformers
knows the way back; only it is used here.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion


def converts(model: PreTrainedModel) -> bool:
    """Whether files store any parameter in another form than memory does."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(entry, WeightConverter) for entry in mapping)


def as_stored(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` of the model, under the names and in the form of its files: slices of the same
    memory wherever transformers takes slices."""
    if not converts(model):
        return dict(parameters)
    return dict(revert_weight_conversion(model, parameters))
