"""The families that see images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.families.family import COMMON, GEMMA_3, WIDTH, WITH_HEAD_DIM, Family

QWEN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_3_TOWER = QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
QWEN_3_VL = WITH_HEAD_DIM | {
    "rope_parameters": QWEN_ROPE | {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
}

WITH_IMAGES = [
    Family(
        name="Qwen 2 VL",
        model_type="qwen2_vl",
        settings=COMMON | {"rope_parameters": QWEN_ROPE | {"mrope_section": [4, 6, 6]}},
        vision={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": WIDTH,
            "mlp_ratio": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        patch=14,
    ),
    Family(
        name="Qwen 2.5 VL",
        model_type="qwen2_5_vl",
        settings=COMMON | {"rope_parameters": QWEN_ROPE | {"mrope_section": [4, 6, 6]}},
        vision=QWEN_TOWER | {"window_size": 56, "fullatt_block_indexes": [1]},
        patch=14,
    ),
    Family(
        name="Qwen 3 VL",
        model_type="qwen3_vl",
        settings=QWEN_3_VL,
        vision=QWEN_3_TOWER,
        patch=16,
    ),
    Family(
        name="Qwen 3 VL MoE",
        model_type="qwen3_vl_moe",
        settings=QWEN_3_VL
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,  # published ones say so, and vLLM reads it
        },
        vision=QWEN_3_TOWER,
        patch=16,
    ),
    Family(
        name="Gemma 3 with a tower",
        model_type="gemma3",
        settings=GEMMA_3,
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        patch=7,
        generator="hf",
    ),
]


def save_processor(family: Family, directory: Path) -> None:
    """Images of 4 to 16 tokens; of Gemma 3 all are 56 pixels high and wide."""
    if family.model_type == "gemma3":
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(directory)
        return
    token = (2 * family.patch) ** 2
    size = {"shortest_edge": 4 * token, "longest_edge": 16 * token}
    Qwen2VLImageProcessorPil(size=size, patch_size=family.patch).save_pretrained(directory)
