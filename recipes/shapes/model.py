"""The task's model, tokenizer and image processor: a Qwen2.5-VL of 0.2 million parameters, made here."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from workers.quiet import quiet

PAD, END, UNKNOWN = "<pad>", "<|im_end|>", "<unk>"
BEGIN_IMAGE, END_IMAGE, IMAGE, VIDEO = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL = (PAD, END, UNKNOWN, BEGIN_IMAGE, END_IMAGE, IMAGE, VIDEO)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
PATCH = 14


def make_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A token for each word, split at spaces."""
    vocab = {name: number for number, name in enumerate((*SPECIAL, "user", "assistant", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(directory: Path, words: tuple[str, ...], *, seed: int = 0) -> None:
    """Writes model, tokenizer and image processor; the weights depend on the seed only."""
    tokenizer = make_tokenizer(words)
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(ids) // 8) * 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[BEGIN_IMAGE],
        vision_end_token_id=ids[END_IMAGE],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    with quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (4 * PATCH) ** 2}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(directory)
