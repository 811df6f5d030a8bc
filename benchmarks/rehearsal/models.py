"""Tiny models of the rehearsal, with heads that the variable-length kernel takes: dense, a mixture of
experts, and one that sees images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
IMAGE, IMAGE_BEGIN, IMAGE_END, VIDEO = 500, 501, 502, 503
"""Token ids that stand for an image's patches, its two ends, and a video's."""
PATCH, MERGED = 14, 2
"""Pixels of a patch's side, and patches of the side of a token."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make_dense(directory: Path) -> None:
    """A Qwen2 of two layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(directory)


def make_experts(directory: Path) -> None:
    """A Qwen3-MoE of two layers with four experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def make_images(directory: Path) -> None:
    """A Qwen2.5-VL of two layers with a tower of two, whose first one attends in windows of 56 pixels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = Qwen2_5_VLConfig(
        text_config={
            **SIZES,
            "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGED,
            "temporal_patch_size": 2,
            "window_size": 2 * PATCH * MERGED,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_BEGIN,
        vision_end_token_id=IMAGE_END,
        tie_word_embeddings=False,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
    side = MERGED * PATCH
    size = {"shortest_edge": side**2, "longest_edge": side**2 * 64}
    Qwen2VLImageProcessorPil(size=size, patch_size=PATCH).save_pretrained(directory)


MAKERS: dict[str, Callable[[Path], None]] = {
    "dense": make_dense,
    "experts": make_experts,
    "images": make_images,
}
