"""The quickstart's model and tokenizer: standard Hugging Face parts, made here, so that nothing is downloaded.

A Qwen2 of about a million parameters and a byte-level BPE tokenizer with a chat template. Leaves out training (warm_start.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MERGES = [("S", "o"), ("r", "t"), ("So", "rt")]
"""One word of the task as one token; everything else is bytes."""


@dataclass(kw_only=True)
class ModelShape:
    """Sizes of the quickstart's model; the default has 1.1 M parameters. head_dim (hidden / heads) is one that vLLM has for CPUs."""

    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    max_tokens: int = 512
    """Prompt and response together."""
    tie_word_embeddings: bool = False


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, the special tokens, the merges: 264 tokens, so that a vocabulary-parallel layer divides by 2, 4 and 8."""
    special = [PAD, END, USER, ASSISTANT, SYSTEM]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    bpe = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) % 8 == 0, len(tokenizer)
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, shape: ModelShape, seed: int) -> Qwen2ForCausalLM:
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
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def describe(shape: ModelShape) -> dict[str, int | bool]:
    """The sizes as plain data."""
    return asdict(shape)
