"""The families with mixtures of experts."""

from __future__ import annotations

from benchmarks.families.family import COMMON, FULL_HEADS, HEADS, WINDOW, WITH_HEAD_DIM, Family

MIXTURES = [
    Family(
        name="Qwen 3 MoE",
        model_type="qwen3_moe",
        settings=WITH_HEAD_DIM
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
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
        settings=FULL_HEADS
        | {
            "num_key_value_heads": HEADS,
            "q_lora_rank": 48,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
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
]
