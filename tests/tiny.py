"""Tiny models, tokenizers and data, made locally: the real loading code runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB = 128
EOS, PAD = 1, 0


def make_model(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    tied: bool = True,
) -> Path:
    """A random Qwen2 of about 0.3 M parameters with a tokenizer whose words are the numbers 0
    to 127."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32 * heads,
        intermediate_size=64 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=str(EOS), pad_token=str(PAD)
    ).save_pretrained(directory)
    return directory


def make_data(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """Prompts of 2 to 8 numbers."""
    generator = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        tokens = generator.integers(3, VOCAB, generator.integers(2, 9))
        lines.append(json.dumps({"prompt": " ".join(map(str, tokens)), "answer": str(row)}) + "\n")
    path.write_text("".join(lines))
    return path


def tiny_grpo(directory: Path) -> dict[str, object]:
    """Settings of recipes.grpo in this process, with engine hf, on a tiny model and 8 prompts."""
    return {
        "runtime": "local",
        "model.path": make_model(directory / "model", layers=1),
        "data.train": make_data(directory / "prompts.jsonl", rows=8),
        "data.batch_size": 4,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-2,
        "metrics.tensorboard": False,
    }


def by_length(*, response: str, **columns: object) -> float:
    """A reward that differs between responses."""
    return float(len(response) % 5)
