"""What vLLM refuses of a model, by its configuration, before vLLM or a process is started.

The rules are those of vLLM's layers (heads, key-value heads, MLP and the vocabulary, which it pads,
are divided by tp) and of single models of its; tests hold them against vLLM itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from workers.engines.model.loading import standard_sizes
from workers.generation.cache import num_kv_heads
from workers.generation.config import GenerationConfig

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it."""


def check_fits(model: PretrainedConfig, config: GenerationConfig) -> None:
    """ValueError with the sizes that would do, where tp or pp do not fit the model, or where vLLM's
    model of its family lacks what its configuration asks for."""
    sizes = standard_sizes(model)
    if "num_attention_heads" in sizes and (problem := why_not(sizes, config.tp)):
        fitting = [
            tp for tp in range(1, sizes["num_attention_heads"] + 1) if not why_not(sizes, tp)
        ]
        raise ValueError(
            f"generation.tp is {config.tp}, which does not fit the model's {problem}; use one of "
            f"{fitting}"
        )
    layers = sizes.get("num_hidden_layers", config.pp)
    if config.pp > layers:
        raise ValueError(
            f"generation.pp is {config.pp}, but the model has {layers} layers; use at most that"
        )
    kinds = set(sizes.get("layer_types") or ())
    if sizes["model_type"] == "qwen2" and len(kinds) > 1:
        raise ValueError(
            "generation.engine is 'vllm', whose qwen2 has no windows in only some of its layers "
            f"(max_window_layers={sizes['max_window_layers']} in the model's config.json); set "
            "generation.engine=hf, or use_sliding_window=false in that file"
        )
    check_long_rope(sizes, config.max_model_len)


def check_long_rope(sizes: Mapping[str, Any], max_model_len: int) -> None:
    """ValueError for rotary embeddings whose table changes with a row's length, where rows may be of
    both lengths: vLLM takes one table for all rows, by max_model_len."""
    rope = sizes.get("rope_parameters") or {}
    first = rope.get("original_max_position_embeddings") or sizes.get(
        "original_max_position_embeddings"
    )
    if rope.get("rope_type") == "longrope" and first and max_model_len > first:
        raise ValueError(
            f"generation.max_model_len is {max_model_len}, and the model's longrope changes at "
            f"{first} tokens: vLLM would give all rows the table of the longer ones; set "
            f"generation.max_model_len={first} or lower (with data.max_prompt_tokens and "
            "max_response_tokens to match), or generation.engine=hf"
        )


def why_not(sizes: Mapping[str, Any], tp: int) -> str:
    """The part of a model with these sizes (loading.standard_sizes) that vLLM can't divide by `tp`;
    empty where it can."""
    heads = sizes["num_attention_heads"]
    kv_heads = num_kv_heads(sizes)
    if heads % tp:
        return f"{heads} attention heads"
    if kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} key-value heads (neither divides the other)"
    inner = inner_size(sizes)
    if inner % tp:
        return f"MLP of {inner}"
    padded = -(-sizes["vocab_size"] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if padded % tp:
        return f"vocabulary, padded to {padded}"
    return ""


def inner_size(sizes: Mapping[str, Any]) -> int:
    """Width of the MLP; four times the model's where the family does not say."""
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        if isinstance(sizes.get(name), int):
            return int(sizes[name])
    return 4 * int(sizes["hidden_size"])
