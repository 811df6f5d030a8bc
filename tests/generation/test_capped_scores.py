"""Families whose attention scores have a soft cap (Gemma 2, section 2.2), which transformers' fused
kernel leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    VaultGemmaConfig,
    VaultGemmaForCausalLM,
)

from tests.generation.streams import PLAIN, hf_engine
from tests.tiny import VOCAB
from tests.tiny import make_model as make_words

FAMILIES: dict[str, tuple[type[PreTrainedModel], type]] = {
    "Gemma 2": (Gemma2ForCausalLM, Gemma2Config),
    "VaultGemma": (VaultGemmaForCausalLM, VaultGemmaConfig),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_hf_caps_the_scores(family: str, tmp_path: Path) -> None:
    """Log-probs of what it draws, beside those of transformers' plain attention; the fused kernel's are
    others."""
    language_model, kind = FAMILIES[family]
    make_words(tmp_path)
    config = kind(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=8, sliding_window=8,
        attn_logit_softcapping=1.0, initializer_range=0.5, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    language_model(config).save_pretrained(tmp_path)
    prompts = [np.array([5, 6, 7]), np.array([9, 8, 7, 6, 5])]
    sampling = replace(PLAIN, max_response_tokens=6)
    made = hf_engine(tmp_path).generate(prompts, np.array([1, 2]), sampling)
    responses = made.response_ids.reshape(2, 6)
    gaps = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=attention, dtype=torch.float32
        )
        expected = []
        for prompt, response in zip(prompts, responses, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, response]))
            with torch.no_grad():
                log_probs = model(ids[None]).logits[0].log_softmax(-1)
            drawn = log_probs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])
            expected.append(drawn.squeeze(1).numpy())
        gaps[attention] = np.abs(made.log_probs.reshape(2, 6) - np.stack(expected)).max()
    assert gaps["eager"] < 1e-5
    assert gaps["sdpa"] > 1e-2, "the cap makes a difference"
