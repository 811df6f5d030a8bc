"""Rotary embeddings that look at a row's length (REALITY A7): however rows are packed, each has the
numbers that transformers gives it alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.engines.threed_cases import TEMPERATURE, plain_outputs
from workers.config import TrainConfig
from workers.engines.base import Head
from workers.engines.model.attention import use_sequence_attention
from workers.engines.model.scored import ScoredModel
from workers.engines.shared.micro_batches import (
    cutting_of,
    gather_outputs,
    make_micro_batches,
    pad_time,
    run_micro_batch,
)
from workers.sequences import Sequences

ORIGINAL = 32
"""Tokens up to which the angles are those of a short row."""
LENGTHS = (10, 60, 12, 33, 32, 31, 40, 61)


def longrope(family: str) -> PreTrainedModel:
    """Phi-3's, or Llama's with the same settings."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.3 * index for index in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    }
    options = {"max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL}
    return _model(family, rope, options)


def dynamic(family: str) -> PreTrainedModel:
    """Dynamic NTK: angles for every length beyond the original one."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    return _model(family, rope, {"max_position_embeddings": ORIGINAL})


def _model(family: str, rope: dict[str, object], options: dict[str, int]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters=rope,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "model", [longrope("phi3"), longrope("llama"), dynamic("llama"), dynamic("qwen3")]
)
def test_each_row_has_the_angles_of_its_own_length(model: PreTrainedModel, packing: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    rows = Sequences(
        token_ids=torch.randint(3, 97, (sum(LENGTHS),), generator=generator),
        lengths=lengths,
        scored_lengths=lengths // 2,
        per_token={},
        per_row={},
    )
    alone = []
    with torch.no_grad():
        for row in range(len(LENGTHS)):
            fresh = copy.deepcopy(model)
            numbers = plain_outputs(fresh, Head.lm, rows.rows(torch.tensor([row])))
            assert numbers.log_probs is not None
            alone.append(numbers.log_probs)
    packed = copy.deepcopy(model)
    use_sequence_attention(packed, fused=True)
    scored = ScoredModel(packed, Head.lm)
    config = TrainConfig(packing=packing, micro_batch_tokens=150)
    for _ in range(2):  # what a pass leaves behind changes nothing
        micro_batches = []
        for micro_batch in make_micro_batches(rows, Head.lm, cutting_of(config, packed)):
            micro_batches.append(pad_time(micro_batch, 3))
        outputs = []
        with torch.no_grad():
            for micro_batch in micro_batches:
                outputs.append(
                    run_micro_batch(scored, micro_batch, entropy=False, temperature=TEMPERATURE)
                )
        found = gather_outputs(micro_batches, outputs, rows).log_probs
        assert_close(found, torch.cat(alone), rtol=0.0, atol=5e-6)
