"""Layers that carry a state (Mamba, linear attention) on the engine hf: padding would be read into it,
and transformers' Mamba computes otherwise where it is given a mask beside its state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from tests.generation import cases, streams
from tests.generation.streams import all_rows, hf_engine, naive
from tests.tiny import make_model as make_words

COMMON = {"vocab_size": cases.VOCAB, "hidden_size": 32, "eos_token_id": 1, "pad_token_id": 0}
HYBRID = {
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(num_hidden_layers=2, state_size=4, **COMMON))


def hybrid() -> PreTrainedModel:
    """Three layers of linear attention and one of full attention."""
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**HYBRID, **COMMON))


@pytest.mark.parametrize("make", [mamba, hybrid])
@pytest.mark.parametrize("preempted", [False, True])
def test_rows_of_all_lengths_are_those_of_transformers(
    make: type[PreTrainedModel], preempted: bool, tmp_path: Path
) -> None:
    """Every row alone, without a cache, by the same draws: ten rows of nine lengths, which end one by
    one, and are read again when they were preempted."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    make_words(tmp_path)
    model.save_pretrained(tmp_path)
    engine = hf_engine(tmp_path)
    keys = streams.submit_mixed(engine)
    if preempted:
        engine.run(5)
        engine.preempt()
    rows = all_rows(engine)
    prompts, seeds = streams.prompts_and_seeds()
    order = [row for place in range(4) for row in range(place, 10, 4)]
    for key, row in zip(keys, order, strict=True):
        got, sampling = rows[key], streams.MIXED[row % 4]
        ids, log_probs = naive([model], prompts[row], int(seeds[row]), sampling, len(got.token_ids))
        assert got.token_ids.tolist() == ids
        np.testing.assert_allclose(got.log_probs, log_probs, rtol=0, atol=1e-5)
