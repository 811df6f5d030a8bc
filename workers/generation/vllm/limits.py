"""What vLLM refuses of a model, by its configuration, before vLLM or a process is started.

The rules are those of vLLM's layers (heads, key-value heads, MLP and the vocabulary, which it pads,
are divided by tp) and of single models of its, read from its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from workers.config import Precision
from workers.engines.model.loading import standard_sizes
from workers.generation import other_engines
from workers.generation.cache import num_kv_heads
from workers.generation.config import GenerationConfig
from workers.generation.vllm.build import installed_kind

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it."""


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those of vLLM's CPUAttentionBackend."""

INNER_SIZES = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
)
"""The widths that vLLM divides, each of its MLPs and experts by itself."""

UNSYNCED = {
    "apertus": "can't be built without its memory",
    "bloom": "can't be built without its memory",
    "falcon": "reorders its weights while it loads them",
    "gpt_oss": "computes on its weights while it loads them",
    "llama4": "reorders its weights while it loads them",
    "llama4_text": "reorders its weights while it loads them",
    "mamba": "computes on its weights while it loads them",
}
"""Families whose vLLM model can't say where it keeps which slice of a checkpoint: that is discovered
on the meta device, by what its loaders copy."""

OTHERWISE = {"phimoe": "leaves out the bias of its head"}
"""Families whose vLLM model computes something else than transformers'."""
BIASED_ROUTERS = ("ernie4_5_moe", "minimax_m2")
"""Families whose routers choose by a bias and not by groups: vLLM's code for CPUs knows the bias with
groups alone, and would leave it out."""


def check_known(model: PretrainedConfig) -> None:
    """ValueError for a family that vLLM has no model of and whose transformers model its
    Transformers backend can't use."""
    kind = type(model)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return  # the model's own code
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if language_model._supports_attention_backend or find_spec("vllm") is None:
        return
    # Imported for such families only: it takes seconds.
    from vllm.model_executor.models.registry import ModelRegistry

    if language_model.__name__ not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"generation.engine is 'vllm', which has no model of {model.model_type} and can't use "
            f"transformers' (its attention is its own); set generation.engine to {other_engines('vllm')}"
        )


def check_meta(model: PretrainedConfig) -> None:
    """ValueError for a family whose weights can't be synchronised."""
    if why := UNSYNCED.get(model.model_type):
        raise ValueError(
            f"generation.engine is 'vllm', whose {model.model_type} {why}, so that a trainer's "
            f"weights can't be sent to it; set generation.engine to {other_engines('vllm')}"
        )


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
            f"generation.engine to {other_engines('vllm')}, or use_sliding_window=false in that file"
        )
    if why := OTHERWISE.get(model.model_type):
        raise ValueError(
            f"generation.engine is 'vllm', whose {model.model_type} {why}, so that its log-probs are not "
            f"those of training; set generation.engine to {other_engines('vllm')}"
        )
    check_router_bias(model.model_type, installed_kind())
    if sizes.get("kv_lora_rank"):
        check_latent(sizes, config.precision, installed_kind())
    else:
        check_head_size(sizes, installed_kind())
    check_long_rope(sizes, config.max_model_len)
    check_linear(sizes, config.precision, installed_kind())


def check_router_bias(model_type: str, build: str) -> None:
    """ValueError for routers that vLLM's build for "cpu" computes without their bias."""
    if model_type in BIASED_ROUTERS and build == "cpu":
        raise ValueError(
            f"generation.engine is 'vllm', whose CPU build leaves out the bias by which routers of "
            f"{model_type} choose; set generation.engine to {other_engines('vllm')}, or generate on GPUs"
        )


def check_head_size(sizes: Mapping[str, Any], build: str) -> None:
    """ValueError for heads that the attention of vLLM's build for "cpu" does not have; found at its first
    step otherwise."""
    if build != "cpu" or not sizes.get("num_attention_heads"):
        return
    head_dim = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    for size in filter(None, (head_dim, sizes.get("global_head_dim"))):
        if size not in CPU_HEAD_SIZES:
            raise ValueError(
                f"generation.engine is 'vllm', whose CPU build has no attention for heads of {size} numbers "
                f"({', '.join(map(str, CPU_HEAD_SIZES))}); set generation.engine to "
                f"{other_engines('vllm')}, or generate on GPUs"
            )


def check_linear(sizes: Mapping[str, Any], precision: Precision, build: str) -> None:
    """ValueError for linear attention in float32, which vLLM's build for "cpu" lacks; found at its first
    step otherwise."""
    linear = "linear_attention" in (sizes.get("layer_types") or ())
    if linear and build == "cpu" and precision is Precision.fp32:
        raise ValueError(
            f"generation.engine is 'vllm', whose CPU build computes linear attention "
            f"({sizes['model_type']}) in bfloat16 alone; set generation.engine to "
            f"{other_engines('vllm')}, or generation.precision=bf16"
        )


def check_latent(sizes: Mapping[str, Any], precision: Precision, build: str) -> None:
    """ValueError for latent attention that vLLM's build for "cpu" computes inexactly and the one for
    "cuda" in half precision only."""
    if build == "cpu":
        raise ValueError(
            f"generation.engine is 'vllm', whose CPU build computes latent attention "
            f"({sizes['model_type']}) otherwise than transformers, by 0.06 in log-probs and more; set "
            f"generation.engine to {other_engines('vllm')}, or generate on GPUs"
        )
    if build == "cuda" and precision is Precision.fp32:
        raise ValueError(
            f"generation.precision is fp32, in which vLLM has no latent attention "
            f"({sizes['model_type']}) on GPUs; set generation.precision=bf16, or generation.engine to "
            f"{other_engines('vllm')}"
        )


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
            f"max_response_tokens to match), or generation.engine to {other_engines('vllm')}"
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
    for name, inner in inner_sizes(sizes).items():
        if inner % tp:
            return f"{name} {inner}"
    padded = -(-sizes["vocab_size"] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if padded % tp:
        return f"vocabulary, padded to {padded}"
    return ""


def inner_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Widths of the MLPs and of the experts, by the names that the family has for them; four times the
    model's where it does not say."""
    found: dict[str, int] = {}
    for name in INNER_SIZES:
        value = sizes.get(name)
        for width in value if isinstance(value, list) else [value]:
            if isinstance(width, int) and width > 0:
                found[name] = math.gcd(found.get(name, 0), width)
    return found or {"MLP": 4 * int(sizes["hidden_size"])}
