"""The quickstart's model and tokenizer: standard Hugging Face parts, made here, so that nothing is
downloaded.

A Qwen2 of about a million parameters and a byte-level BPE tokenizer with a chat template. Leaves
out training (warm_start.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD = "<|endoftext|>"
END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MERGES = [("S", "o"), ("r", "t"), ("So", "rt")]
"""One word of the task as one token; everything else is bytes."""


@dataclass(kw_only=True)
class ModelShape:
    """Sizes of the quickstart's model; the default has 1.1 M parameters. head_dim (hidden /
    heads) is one that vLLM has for CPUs."""

    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    max_tokens: int = 512
    """Prompt and response together."""
    tie_word_embeddings: bool = False


def make_tokenizer() -> Qwen2Tokenizer:
    """256 bytes, the merges, the special tokens: 264 tokens, so that a vocabulary-parallel layer
    divides by 2, 4 and 8.

    Of Qwen2's own class, because AutoTokenizer builds that one for a Qwen2 model, whatever class
    was saved beside it.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=MERGES,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) % 8 == 0, len(tokenizer)
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, shape: ModelShape, seed: int) -> Qwen2ForCausalLM:
    """A new model with weights that depend on the seed only."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_tokens,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
