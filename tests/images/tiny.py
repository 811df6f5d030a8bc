"""A tiny Qwen2.5-VL with random weights, its tokenizer and its image processor, and rows with
coloured squares."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<pad>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VIDEO = "<|video_pad|>"
GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
WORDS = ("user", "assistant", "how", "many", "what", "color", "red", "green", "blue", "one", "two")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
COLORS = ("red", "green", "blue")


def make_tokenizer(family: str = "qwen2_5_vl") -> PreTrainedTokenizerFast:
    special = (*SPECIAL, VIDEO) if family != "gemma3" else (*SPECIAL, VIDEO, *GEMMA)
    names = [*special, *WORDS]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    if family == "gemma3":
        fast.chat_template = TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", GEMMA[0]
        )
    return fast


PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_vl_moe": 16}
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
    "qwen3_vl": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    },
}
TEXT["qwen2_vl"] = TEXT["qwen2_5_vl"]
TEXT["qwen3_vl_moe"] = {
    **TEXT["qwen3_vl"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,  # its files have matrices transposed, told by their shapes alone
    "norm_topk_prob": True,  # published ones say so, and vLLM reads it
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {"window_size": 56, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"num_position_embeddings": 64},
}
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]


def make_model(
    directory: Path,
    *,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    layers: int = 2,
    fed_layers: int = 1,
) -> Path:
    """About 0.1 M parameters: a decoder and a vision tower of two layers each; Qwen2.5-VL's tower has
    windowed attention in its first one, Qwen3-VL's gives the first ones' features to as many layers of
    the decoder (`fed_layers`). Heads of 32 numbers are the smallest that vLLM has on CPUs."""
    if family == "gemma3":
        return make_gemma(directory, seed, layers)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<pad>"],
            "bos_token_id": None,
            **TEXT[family],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": PATCH[family],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **VISION[family],
            **({"deepstack_visual_indexes": list(range(fed_layers))} if "qwen3" in family else {}),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    save(config, directory)
    tokenizer.save_pretrained(directory)
    side = 2 * PATCH[family]
    size = {"shortest_edge": side**2, "longest_edge": side**2 * 16}
    Qwen2VLImageProcessorPil(size=size, patch_size=PATCH[family]).save_pretrained(directory)
    return directory


def make_gemma(directory: Path, seed: int, layers: int) -> Path:
    """A Gemma 3: images of 56 x 56 pixels, 16 tokens each, whose tokens see each other; a window of 12
    tokens in the first layer, none in the last."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("gemma3")
    ids = tokenizer.get_vocab()
    config = AutoConfig.for_model(
        "gemma3",
        text_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
            "query_pre_attn_scalar": 32,
            "max_position_embeddings": 256,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<pad>"],
            "bos_token_id": None,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 7,
        },
        mm_tokens_per_image=16,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        eos_token_id=ids["<|im_end|>"],
    )
    save(config, directory)
    tokenizer.save_pretrained(directory)
    Gemma3ImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(directory)
    return directory


def save(config: Any, directory: Path) -> None:
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # so that images matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(directory)


def square(color: str, height: int, width: int) -> Image.Image:
    """A black image of these sizes with a coloured square in its middle."""
    image = Image.new("RGB", (width, height))
    image.paste(color, (width // 4, height // 4, width // 2, height // 2))
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def make_data(path: Path, rows: int = 8) -> Path:
    """Chat messages about images of several sizes, and one in four without an image."""
    lines = []
    for row in range(rows):
        content = [{"type": "text", "text": "what color"}]
        color = COLORS[row % 3]
        for number in range(row % 4):
            name = f"{path.stem}-{row}-{number}.png"
            size = (28 * (1 + (row + number) % 3), 28 * (1 + row % 2))
            square(color, *size).save(path.parent / name)
            content.insert(0, {"type": "image", "image": name})
        lines.append(
            json.dumps({"prompt": [{"role": "user", "content": content}], "answer": color})
        )
    path.write_text("\n".join(lines) + "\n")
    return path
