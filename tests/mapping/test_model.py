"""ModelSpec against transformers' own parameter counts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.zoo import MODELS, model_spec

CONFIGS = [
    LlamaConfig(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=700,
        vocab_size=1000,
    ),
    Qwen2Config(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=512,
        vocab_size=900,
        tie_word_embeddings=True,
    ),
    OPTConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        ffn_dim=1024,
        vocab_size=2000,
        word_embed_proj_dim=256,
        max_position_embeddings=4,
    ),
    MixtralConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=300,
        vocab_size=500,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    Qwen3MoeConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=300,
        vocab_size=500,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_parameters_are_those_of_transformers(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert ModelSpec.from_hf(config.to_dict()).num_parameters == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-34b", 33.744), ("llama-70b", 68.977)],
)
def test_published_sizes(name, billions):
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_mixtral_reads_all_experts_for_many_tokens_and_two_for_one():
    spec = MODELS["mixtral-8x7b"]
    expert = 3 * 4096 * 14336
    assert spec.num_parameters / 1e9 == pytest.approx(46.7, rel=0.01)
    assert spec.touched_layer_parameters(1) == pytest.approx(spec.attention_parameters + 2 * expert)
    assert spec.touched_layer_parameters(10_000) == pytest.approx(spec.layer_parameters)


def test_grouped_query_attention_shrinks_the_cache():
    assert MODELS["llama-7b"].kv_elements_per_token == 2 * 32 * 4096
    assert MODELS["llama-70b"].kv_elements_per_token == 2 * 80 * 1024


def test_unknown_model_and_broken_config_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"with a config\.json; .*known are llama-7b, "):
        model_spec("gpt-5")
    for name, meant in {
        "llama-8b": "llama3-8b",
        "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
        "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
        "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    }.items():
        with pytest.raises(ValueError, match=f"did you mean {meant}[?]"):
            model_spec(name)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ModelSpec.from_hf({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10})
    with pytest.raises(ValueError, match="num_kv_heads 3"):
        ModelSpec.from_hf(
            {
                "hidden_size": 8,
                "num_attention_heads": 4,
                "num_key_value_heads": 3,
                "vocab_size": 10,
                "num_hidden_layers": 1,
            },
            name="odd",
        )
