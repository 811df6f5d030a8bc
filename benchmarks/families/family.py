"""Family: a configuration of transformers from which a tiny model of odd shape is made.

Vocabulary 1003 (1004 where a layout needs an even one), width 192, 6 heads over 2 key-value heads
of 32, 5 layers, windows of 16 tokens, tied and untied embeddings, rotary embeddings of every kind,
biases and soft caps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from benchmarks.families.tokens import BOS, EOS, PAD, TOKENS, VOCABULARY

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW, LENGTH = 192, 6, 2, 32, 5, 16, 128
NOISE = 0.05
"""Added to every weight, norms, biases and stored buffers too, so that one that is lost shows."""

COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 320,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": LENGTH,
}
WITH_HEAD_DIM = COMMON | {"head_dim": HEAD_DIM}
FULL_HEADS: dict[str, Any] = {
    name: value for name, value in COMMON.items() if name != "num_key_value_heads"
}
GEMMA_3 = WITH_HEAD_DIM | {"sliding_window": WINDOW, "query_pre_attn_scalar": 48}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family(name="Qwen 2", model_type="qwen2", settings=COMMON)"""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = VOCABULARY
    packing: bool = True
    """False: its layers can't be told where the sequences of a row begin, so that rows are padded
    (train.packing=false)."""
    vision: dict[str, Any] = field(default_factory=dict)
    """The settings of a vision tower, beside the decoder of `settings`: prompts have images."""
    patch: int = 0
    """Pixels along each side of a patch of the tower."""
    generator: str = "vllm"
    """The generation engine."""

    @property
    def sees_images(self) -> bool:
        return bool(self.vision)

    @property
    def image_text(self) -> str:
        """What the family's chat templates write for an image; empty where it sees none."""
        if not self.sees_images:
            return ""
        gemma = self.model_type == "gemma3"
        return "<start_of_image>" if gemma else "<|vision_start|><|image_pad|><|vision_end|>"

    @property
    def key(self) -> str:
        """The name as a folder's."""
        return self.name.lower().replace(" ", "-").replace(",", "").replace(".", "")

    def config(self, **changes: Any) -> PretrainedConfig:
        """`changes`: of the decoder's settings."""
        text = {
            "vocab_size": self.vocabulary,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **self.settings,
            **changes,
        }
        settings = self._with_tower(text) if self.sees_images else text
        config = AutoConfig.for_model(self.model_type, **settings)
        assert isinstance(config, PretrainedConfig)
        return config

    def _with_tower(self, text: dict[str, Any]) -> dict[str, Any]:
        """The configuration of a decoder beside a vision tower."""
        common = {
            "text_config": text,
            "vision_config": self.vision | {"patch_size": self.patch},
            "eos_token_id": EOS,
            "tie_word_embeddings": False,
        }
        if self.model_type == "gemma3":
            return common | {
                "mm_tokens_per_image": 16,
                "boi_token_index": TOKENS["<start_of_image>"],
                "eoi_token_index": TOKENS["<end_of_image>"],
                "image_token_index": TOKENS["<image_soft_token>"],
            }
        return common | {
            "image_token_id": TOKENS["<|image_pad|>"],
            "video_token_id": TOKENS["<|video_pad|>"],
            "vision_start_token_id": TOKENS["<|vision_start|>"],
            "vision_end_token_id": TOKENS["<|vision_end|>"],
        }
