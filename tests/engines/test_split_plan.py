"""What tensor parallelism refuses before anything is loaded, and which heads a rank has."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PretrainedConfig

from tests.engines.split_families import SPLIT, odd_model
from workers.config import TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.model.split_plan import Heads, bounds, check_fits, fitting_sizes

TINY = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 49,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def config(family: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**TINY, **changes})


@pytest.mark.parametrize("family", SPLIT)
def test_every_divisor_of_the_query_heads_fits(family: str) -> None:
    """A3, A4: vocabularies, MLPs and key-value heads need not divide."""
    with torch.device("meta"):
        assert fitting_sizes(odd_model(family).config) == [1, 2, 3, 6]


@pytest.mark.parametrize("engine", ["fsdp", "threed"])
def test_query_heads_that_do_not_divide_are_refused_with_the_sizes_that_fit(engine: str) -> None:
    train = TrainConfig(engine=engine, tp=4)
    with pytest.raises(ValueError, match=r"divide num_attention_heads 6; sizes that fit: 1, 2, 3"):
        engine_class(engine).check(config("llama"), train, Head.lm, 4)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"^tp=2: transformers has no tensor-parallel plan for gpt2; use tp=1$"),
        ("mixtral", r"^tp=2: mixtral can't be split at layers\.0\.mlp.*; use tp=1, or train\.ep"),
        ("deepseek_v3", r"^tp=2: deepseek_v3 can't be split at layers\.0\.self_attn\.q_a_proj"),
        ("olmo_hybrid", r"^tp=2: olmo_hybrid can't be split at layers\.0\.linear_attn"),
        ("granite_swa", r"^tp=2: granite_swa can't be split at layers\.0\.self_attn"),
        ("doge", r"^tp=2: doge can't be split"),
        ("nanochat", r"^tp=2: transformers does not say which module of nanochat is last"),
    ],
)
def test_what_can_not_be_split_is_refused_by_one_line(family: str, message: str) -> None:
    """Experts, latent attention, states, sinks: before anything is loaded."""
    with pytest.raises(ValueError, match=message) as caught:
        check_fits(config(family), 2)
    assert "\n" not in str(caught.value)


def test_a_model_of_70_billion_parameters_is_checked_in_seconds() -> None:
    large = config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    start = time.monotonic()
    check_fits(large, 8)
    assert time.monotonic() - start < 60


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4))
def test_each_rank_has_the_key_value_heads_of_its_queries(
    keys: int, group: int, queries_per_rank: int
) -> None:
    """Query i of the model uses key-value head i // group, on whatever rank it is; on a rank,
    query j uses head j // (queries / heads)."""
    heads = Heads(keys * group, keys)
    if heads.queries % queries_per_rank:
        return
    tp = heads.queries // queries_per_rank
    for rank in range(tp):
        first, last = bounds(heads.queries, rank, tp)
        local = heads.needed(rank, tp)
        assert queries_per_rank % len(local) == 0
        copies = queries_per_rank // len(local)
        for query in range(first, last):
            assert local[(query - first) // copies] == query // group
