"""The model families of the benchmark, each as a tiny model of odd shape with random weights that needs
no download."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from benchmarks.families.experts import GRANITE, MIXTURES
from benchmarks.families.family import (
    COMMON,
    FULL_HEADS,
    GEMMA_3,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    LENGTH,
    WIDTH,
    WINDOW,
    WITH_HEAD_DIM,
    Family,
)
from benchmarks.families.images import WITH_IMAGES, save_processor
from workers.engines.model.loading import language_model_class, stored_buffers

NOISE = 0.05
"""Added to every weight, norms, biases and stored buffers too, so that one that is lost shows."""
WINDOWS = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
"""Kinds of the five layers of a family that mixes windows with whole attention."""

FAMILIES = [
    Family(name="Llama", model_type="llama", settings=COMMON | {"tie_word_embeddings": False}),
    Family(
        name="Llama, tied, llama3 rope",
        model_type="llama",
        settings=COMMON
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    Family(
        name="Llama, attention and MLP biases",
        model_type="llama",
        settings=COMMON | {"attention_bias": True, "mlp_bias": True},
    ),
    Family(name="Gemma", model_type="gemma", settings=WITH_HEAD_DIM),
    Family(
        name="Gemma 2",
        model_type="gemma2",
        settings=WITH_HEAD_DIM
        | {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 48,
            # Random weights have small scores, which the published cap would leave as they are.
            "attn_logit_softcapping": 0.1,
        },
    ),
    Family(
        name="Gemma 3",
        model_type="gemma3_text",
        settings=GEMMA_3,
    ),
    Family(name="Qwen 2", model_type="qwen2", settings=COMMON),
    Family(
        name="Qwen 2, windows",
        model_type="qwen2",
        settings=COMMON
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    Family(name="Qwen 3", model_type="qwen3", settings=WITH_HEAD_DIM),
    Family(name="Mistral", model_type="mistral", settings=COMMON | {"sliding_window": WINDOW}),
    Family(
        name="Ministral",
        model_type="ministral",
        settings=WITH_HEAD_DIM | {"sliding_window": WINDOW, "layer_types": WINDOWS},
    ),
    Family(
        name="Granite",
        model_type="granite",
        settings=COMMON | GRANITE,
    ),
    Family(name="Phi-3", model_type="phi3", settings=COMMON | {"sliding_window": WINDOW}),
    Family(
        name="Phi-3, longrope",
        model_type="phi3",
        settings=COMMON
        | {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)],
                "long_factor": [1.0 + 0.3 * i for i in range(HEAD_DIM // 2)],
                "original_max_position_embeddings": 32,
            },
        },
    ),
    Family(name="Phi", model_type="phi", settings=FULL_HEADS | {"partial_rotary_factor": 0.5}),
    Family(name="GLM-4", model_type="glm4", settings=WITH_HEAD_DIM),
    Family(name="GLM", model_type="glm", settings=WITH_HEAD_DIM),
    Family(name="OLMo", model_type="olmo", settings=COMMON | {"clip_qkv": 2.0}),
    Family(name="OLMo 2", model_type="olmo2", settings=COMMON),
    Family(
        name="OLMo 3",
        model_type="olmo3",
        settings=COMMON | {"sliding_window": WINDOW, "layer_types": WINDOWS},
    ),
    Family(name="SmolLM 3", model_type="smollm3", settings=COMMON | {"no_rope_layer_interval": 2}),
    Family(
        name="StarCoder 2", model_type="starcoder2", settings=COMMON | {"sliding_window": WINDOW}
    ),
    Family(
        name="GPT-2",
        model_type="gpt2",
        settings={"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": LENGTH},
    ),
    Family(name="GPT-NeoX", model_type="gpt_neox", settings=FULL_HEADS),
    Family(
        name="OPT",
        model_type="opt",
        settings={
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 320,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": LENGTH,
        },
    ),
    Family(
        name="Bloom",
        model_type="bloom",
        settings={"hidden_size": WIDTH, "n_head": HEADS, "n_layer": LAYERS},
        packing=False,
    ),
    Family(
        name="MPT",
        model_type="mpt",
        settings={"d_model": WIDTH, "n_heads": 6, "n_layers": 5},
        packing=False,
    ),
    Family(
        name="Falcon",
        model_type="falcon",
        settings={
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_kv_heads": KV_HEADS,
            "new_decoder_architecture": True,
            "max_position_embeddings": LENGTH,
        },
        packing=False,
    ),
    Family(
        name="StableLM",
        model_type="stablelm",
        settings=COMMON | {"partial_rotary_factor": 0.25},
        packing=False,
    ),
    Family(name="Cohere", model_type="cohere", settings=COMMON | {"logit_scale": 0.25}),
    Family(
        name="Cohere 2",
        model_type="cohere2",
        settings=WITH_HEAD_DIM | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    Family(name="Nemotron", model_type="nemotron", settings=WITH_HEAD_DIM, packing=False),
    Family(
        name="EXAONE 4",
        model_type="exaone4",
        settings=WITH_HEAD_DIM | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    Family(name="Seed-OSS", model_type="seed_oss", settings=WITH_HEAD_DIM),
    Family(name="Ernie 4.5", model_type="ernie4_5", settings=WITH_HEAD_DIM),
    Family(name="Helium", model_type="helium", settings=WITH_HEAD_DIM),
    Family(name="Arcee", model_type="arcee", settings=WITH_HEAD_DIM),
    Family(name="Apertus", model_type="apertus", settings=COMMON),
    Family(name="HyperCLOVA X", model_type="hyperclovax", settings=WITH_HEAD_DIM),
    *MIXTURES,
    *WITH_IMAGES,
    Family(
        name="Mamba",
        model_type="mamba",
        settings={"hidden_size": WIDTH, "num_hidden_layers": LAYERS},
        packing=False,
        generator="hf",
    ),
    Family(
        name="Bamba",
        model_type="bamba",
        settings=COMMON
        | {
            "attn_layer_indices": [1, 3],
            "attn_rotary_emb": 16,
            "mamba_n_heads": 12,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
        },
        packing=False,
        generator="hf",
    ),
]


def make_model(family: Family, directory: Path, *, vocabulary: int = 0) -> Path:
    """The family's tiny model in `directory`; one that sees images has its image processor."""
    torch.manual_seed(0)
    config = family.config(**({"vocab_size": vocabulary} if vocabulary else {}))
    model = language_model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in chain(model.parameters(), stored_buffers(model).values()):
            tensor.add_(torch.randn_like(tensor), alpha=NOISE)
    model.save_pretrained(directory)
    if family.sees_images:
        save_processor(family, directory)
    return directory
