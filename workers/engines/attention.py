"""Causal attention for short bfloat16 sequences on a CPU, where PyTorch's fused kernel has a slow backward pass.

Two batched matrix products and a softmax. The query heads of one key-value head are rows of one product, so keys and values are
not repeated; scale and mask cost no pass of their own. Everything else (long rows, float32, explicit masks) goes to the fused kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CPU_ATTENTION = "cpu_short_causal"
"""The name under which transformers finds it."""
LONGEST = 768
"""Tokens up to which this is faster than the fused kernel (docs/training.md has the figures)."""


def prefer_cpu_attention(model: PreTrainedModel) -> None:
    """Use it in every layer of `model` that would use PyTorch's fused kernel."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CPU_ATTENTION)


def cpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [rows, heads, time, head_dim], key and value [rows, key_value_heads, time, ...] -> [rows, time, heads, head_dim]."""
    time = query.shape[2]
    short = query.dtype is torch.bfloat16 and query.device.type == "cpu" and 1 < time <= LONGEST
    causal = attention_mask is None and key.shape[2] == time and module.is_causal and options.get("is_causal") is not False
    if not (short and causal):
        fused: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return fused
    rows, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    scaled = query * (head_dim**-0.5 if scaling is None else scaling)
    scores = torch.baddbmm(
        _causal_bias(time, heads // kv_heads).expand(rows * kv_heads, -1, -1),
        scaled.reshape(rows * kv_heads, -1, head_dim),
        key.reshape(rows * kv_heads, time, head_dim).transpose(1, 2),
    )
    output = torch.bmm(torch.softmax(scores, -1), value.reshape(rows * kv_heads, time, -1))
    return output.view(rows, heads, time, -1).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=64)
def _causal_bias(time: int, copies: int) -> Tensor:
    """bfloat16 [copies * time, time]: 0 where a token may look, -inf where it may not."""
    with torch.inference_mode(False):
        return torch.full((time, time), -torch.inf, dtype=torch.bfloat16).triu_(1).repeat(copies, 1)


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
