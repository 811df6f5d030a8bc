"""Model shapes by name, so that a plan needs no download; sizes are those of the published
config.json files."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from hybridflow.mapping.question.latent import LatentAttention
from hybridflow.mapping.question.model import ModelSpec


def _llama(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocab: int = 32000,
    tied: bool = False,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128 if hidden > 2048 else hidden // heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tied_embeddings=tied,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _llama("llama-7b", 32, 4096, 32, 32, 11008),
        _llama("llama-13b", 40, 5120, 40, 40, 13824),
        _llama("llama-34b", 48, 8192, 64, 8, 22016),
        _llama("llama-70b", 80, 8192, 64, 8, 28672),
        _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        _llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256),
        _llama("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936, tied=True),
        _llama("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151936, tied=True),
        _llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        _llama("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064),
        _llama("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064),
        ModelSpec(
            name="mixtral-8x7b", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128,
            intermediate_size=14336, vocab_size=32000, num_experts=8, experts_per_token=2,
            expert_intermediate_size=14336,
        ),
        ModelSpec(
            name="qwen3-30b-a3b", num_layers=48, hidden_size=2048, num_heads=32, num_kv_heads=4, head_dim=128,
            intermediate_size=6144, vocab_size=151936, num_experts=128, experts_per_token=8,
            expert_intermediate_size=768,
        ),
        ModelSpec(
            name="qwen3-235b-a22b", num_layers=94, hidden_size=4096, num_heads=64, num_kv_heads=4,
            head_dim=128,
            intermediate_size=12288, vocab_size=151936, num_experts=128, experts_per_token=8,
            expert_intermediate_size=1536,
        ),
        ModelSpec(
            name="deepseek-v3", num_layers=61, hidden_size=7168, num_heads=128, num_kv_heads=128,
            head_dim=192,
            intermediate_size=18432, vocab_size=129280, num_experts=256, experts_per_token=8,
            expert_intermediate_size=2048, shared_intermediate_size=2048, num_dense_layers=3,
            latent=LatentAttention(query_rank=1536, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128),
        ),
    )
}  # fmt: skip
"""llama-7b, -13b and -70b are Llama 2, llama-34b is Code Llama 34B: the family of the paper's
section 8."""


def model_spec(name: str) -> ModelSpec:
    """A known shape, or the config.json of a Hugging Face directory."""
    if name in MODELS:
        return MODELS[name]
    if Path(name).exists():
        return ModelSpec.from_directory(name)
    meant = [other for other in MODELS if other == _short(name)]
    meant = meant or get_close_matches(_short(name), MODELS, n=1)
    did = f"did you mean {meant[0]}? " if meant else ""
    raise ValueError(
        f"model {name!r} is neither a known shape nor a directory with a config.json; {did}"
        f"known are {', '.join(MODELS)}"
    )


def _short(name: str) -> str:
    """A name of the hub as shapes are called: Qwen/Qwen2.5-7B-Instruct -> qwen2.5-7b."""
    return re.sub(r"-(instruct|chat|base|it|hf)\b.*", "", name.rpartition("/")[2].lower())
