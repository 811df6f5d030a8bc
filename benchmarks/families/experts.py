"""The families with mixtures of experts."""

from __future__ import annotations

from typing import Any

from benchmarks.families.family import (
    COMMON,
    FULL_HEADS,
    HEAD_DIM,
    HEADS,
    WINDOW,
    WITH_HEAD_DIM,
    Family,
)

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
GROUPED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT = FULL_HEADS | {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
"""Latent attention."""
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
"""The multipliers of Granite's families."""

MIXTURES = [
    Family(
        name="Qwen 3 MoE",
        model_type="qwen3_moe",
        settings=WITH_HEAD_DIM
        | SMALL
        | {
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    Family(
        name="Mixtral",
        model_type="mixtral",
        settings=COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        name="OLMoE",
        model_type="olmoe",
        settings=COMMON | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        name="DeepSeek-V3",
        model_type="deepseek_v3",
        settings=LATENT
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",  # published configurations have it, and vLLM reads it
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
        },
    ),
    Family(
        name="GPT-OSS",
        model_type="gpt_oss",
        settings=WITH_HEAD_DIM
        | {
            "intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    Family(
        name="Qwen 2 MoE",
        model_type="qwen2_moe",
        settings=COMMON
        | SMALL
        | {
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [1],
        },
    ),
    Family(
        name="GLM-4 MoE",
        model_type="glm4_moe",
        settings=WITH_HEAD_DIM | GROUPED_EXPERTS | {"use_qk_norm": True, "num_mtp_layers": 0},
    ),
    Family(
        name="dots.llm1",
        model_type="dots1",
        settings=WITH_HEAD_DIM | GROUPED_EXPERTS | {"sliding_window": None},
    ),
    Family(
        name="DeepSeek-V2",
        model_type="deepseek_v2",
        settings=LATENT
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
        },
    ),
    Family(
        name="Granite MoE",
        model_type="granitemoe",
        settings=COMMON | EXPERTS | GRANITE,
    ),
    Family(
        name="Granite MoE, shared expert",
        model_type="granitemoeshared",
        settings=COMMON | EXPERTS | GRANITE | {"shared_intermediate_size": 56},
    ),
    Family(name="Phi-3.5 MoE", model_type="phimoe", settings=COMMON | EXPERTS),
    Family(
        name="Llama 4, text",
        model_type="llama4_text",
        settings=WITH_HEAD_DIM
        | {
            "intermediate_size": 64,
            "intermediate_size_mlp": 160,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": WINDOW,
        },
    ),
    Family(
        name="Ernie 4.5 MoE",
        model_type="ernie4_5_moe",
        settings=WITH_HEAD_DIM
        | {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 40,
        },
    ),
    Family(
        name="Hunyuan MoE",
        model_type="hunyuan_v1_moe",
        settings=WITH_HEAD_DIM | {"num_experts": 4, "moe_topk": 2},
    ),
    Family(
        name="MiniMax-M2",
        model_type="minimax_m2",
        settings=WITH_HEAD_DIM
        | {
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rotary_dim": HEAD_DIM,
            "scoring_func": "sigmoid",  # published configurations have these two, and vLLM reads them
            "use_routing_bias": True,
        },
    ),
    Family(
        name="FlexOlmo",
        model_type="flex_olmo",
        settings=COMMON | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        name="EXAONE MoE",
        model_type="exaone_moe",
        settings=WITH_HEAD_DIM | SMALL | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    Family(
        name="AFMoE",
        model_type="afmoe",
        settings=WITH_HEAD_DIM
        | SMALL
        | {
            "sliding_window": WINDOW,
            "global_attn_every_n_layers": 2,
            "num_shared_experts": 1,
            "score_func": "sigmoid",  # published configurations have these, and vLLM reads them
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family(
        name="LFM2 MoE",
        model_type="lfm2_moe",
        settings=COMMON | SMALL | {"layer_types": ["conv", "full_attention"] * 2 + ["conv"]},
    ),
    Family(
        name="GLM-4.7 Flash",
        model_type="glm4_moe_lite",
        settings=LATENT
        | {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    Family(
        name="Cohere 2 MoE",
        model_type="cohere2_moe",
        settings=WITH_HEAD_DIM
        | {"num_experts": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
]
