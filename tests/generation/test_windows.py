"""What vLLM reads in place of a published window, where its model counts one token more."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from benchmarks.families.models import FAMILIES
from workers.generation.vllm.setup import own_window


@pytest.mark.parametrize(
    ("name", "changes"), [("Cohere 2", {"sliding_window": 15}), ("Gemma 2", {}), ("Llama", {})]
)
def test_cohere_2_sees_as_many_tokens_as_in_transformers(
    name: str, changes: dict[str, int]
) -> None:
    """vLLM's commandr.py makes windows of sliding_window + 1 tokens, transformers' masks of
    sliding_window: 0.0018 nats a token between the two on rows longer than a window of 16."""
    entry = next(family for family in FAMILIES if family.name == name)
    assert own_window(AutoConfig.for_model(entry.model_type, **entry.settings)) == changes
