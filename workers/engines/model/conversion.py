"""Parameters as transformers computes with them, and as its files store them.

A family of mixtures of experts has one file entry for each matrix of each expert; transformers stacks
them in memory, [experts, ...], gate and up together. Other systems read the files' names. transformers
knows the way back; only it is used here. Qwen3-VL-MoE's files have the stacks transposed: transformers
reads both forms by their shapes, and gives back neither; others read the published one.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    revert_weight_conversion,
)


def converts(model: PreTrainedModel) -> bool:
    """Whether files store any parameter in another form than memory does."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(entry, WeightConverter) for entry in mapping)


def as_stored(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` of the model, under the names and in the form of its files: slices of the same
    memory wherever transformers takes slices."""
    if not converts(model):
        return dict(parameters)
    stored = dict(revert_weight_conversion(model, parameters))
    for part, (first, second) in _transposed(model).items():
        for name in stored:
            if part in name:
                stored[name] = stored[name].transpose(first, second)
    return stored


def _transposed(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Parts of names of the parameters that transformers transposes where their shape asks for it, and
    the two dims."""
    found = {}
    for entry in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(entry, WeightConverter):
            continue
        for operation in entry.operations:
            if isinstance(operation, Transpose) and operation.check_dims:
                for part in entry.target_patterns:
                    found[part] = (operation.dim0, operation.dim1)
    return found
