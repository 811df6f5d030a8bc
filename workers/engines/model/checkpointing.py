"""Activation checkpointing: decoder layers that are computed again in the backward pass, whole, or
selectively, without their matrix products and attention (Korthikanti et al. 2022, section 5)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""Operations whose outputs selective checkpointing keeps."""


def enable_activation_checkpointing(model: PreTrainedModel, *, selective: bool = False) -> None:
    """Recompute each decoder layer in the backward pass; the layers' contents stay in eval mode.
    selective=True: all but the outputs of products and attention."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"activation_checkpointing is true, but {type(model).__name__} does not support it; "
            "set it to false"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(options)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _policy(_context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    if isinstance(operation, OpOverload) and operation.name().partition(".")[0] in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
