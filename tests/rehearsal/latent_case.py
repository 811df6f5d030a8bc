"""One process: a DeepSeek V2 in vLLM on a CPU takes other weights; what latent attention derives from
them is compared with the definition."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DeepseekV2Config

from hybridflow.context import RankContext
from hybridflow.resharding import Box, LocalParameter, LocalShard
from workers.config import ModelConfig, Precision
from workers.generation.config import GenerationConfig
from workers.generation.vllm.engine import VllmEngine
from workers.generation.vllm.weights import VllmWeights

HEADS, NOPE, VALUE, RANK = 4, 128, 128, 512
CONFIG = DeepseekV2Config(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    max_position_embeddings=256,
    first_k_dense_replace=2,  # no experts
    kv_lora_rank=RANK,
    q_lora_rank=None,
    qk_nope_head_dim=NOPE,
    qk_rope_head_dim=64,
    v_head_dim=VALUE,
)


def largest_difference(engine: VllmEngine, trainer: Any) -> float:
    """Of the absorbed matrices to kv_b_proj's halves [heads, nope | value, rank], over layers."""
    largest = 0.0
    for index, layer in enumerate(trainer.model.layers):
        weight = layer.self_attn.kv_b_proj.weight.detach().view(HEADS, NOPE + VALUE, RANK)
        runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        attention = runner.get_model().get_submodule(f"model.layers.{index}.self_attn.mla_attn")
        latent = next(m for m in attention.modules() if type(m).__name__ == "MLAAttention")
        pairs = (
            (latent.W_UK_T, weight[:, :NOPE]),
            (latent.W_UV, weight[:, NOPE:].transpose(1, 2)),
        )
        for derived, expected in pairs:
            largest = max(largest, float((derived - expected).abs().max()))
    return largest


def main(directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.cpu._is_amx_tile_supported = lambda: False  # its kernel keeps them packed
    trainer = AutoModelForCausalLM.from_config(CONFIG).float().eval()
    trainer.save_pretrained(directory)
    settings = GenerationConfig(precision=Precision.fp32, max_model_len=64, kv_cache_bytes=2**22)
    engine = VllmEngine(
        model=ModelConfig(path=directory),
        config=settings,
        context=RankContext(),
        load_weights=False,
    )
    weights = VllmWeights(engine.llm)
    parameters = dict(trainer.named_parameters())
    with torch.no_grad():
        for destination in weights.destinations():
            (shard,) = destination.shards
            shard.tensor.copy_(parameters[destination.name])
    result = {"views": largest_difference(engine, trainer)}
    sources = []
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        shard = LocalShard(Box((0,) * len(shape), shape), parameter.detach().mul_(1.5))
        sources.append(LocalParameter(name, shape, parameter.dtype, (shard,)))
    weights.share(sources)
    for source, destination in zip(sources, weights.destinations(), strict=True):
        destination.shards[0].tensor.copy_(source.shards[0].tensor)
    result["shared"] = largest_difference(engine, trainer)
    weights.commit()
    result["committed"] = largest_difference(engine, trainer)
    Path(directory, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
