"""Tiny models of every family that tensor parallelism splits, odd in shape, and one pass over them:
log-probs, entropies and gradients of one tensor rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers.engines.base import Head
from workers.engines.model.attention import use_sequence_attention
from workers.engines.model.packing import packing_of
from workers.engines.model.scored import ScoredModel
from workers.engines.model.tensor_parallel import parallelize
from workers.engines.model.tensor_parts import TensorPart

VOCABULARY = 101
LENGTHS = (9, 7, 8)
"""Rows of one packed micro-batch; with tp 2 and 3 their sum is divisible."""
SPLIT = [
    *("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2"),
    *("gemma3_text", "glm", "glm4", "gpt_neox", "granite", "helium", "hyperclovax", "jais2"),
    *("llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3"),
    *("qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
]
"""Model types that are split; everything else in transformers is refused (test_split_plan.py)."""
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"head_dim": 12},
    "glm4": {"attention_bias": True},
    "glm": {"attention_bias": True},
}


def odd_model(
    family: str, *, heads: int = 6, kv_heads: int = 2, tied: bool = False
) -> PreTrainedModel:
    """A random model: odd vocabulary and MLP, windows shorter than the rows."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12 * heads,
        "intermediate_size": 49,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
        **OPTIONS.get(family, {}),
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def passed(
    whole: PreTrainedModel, mesh: DeviceMesh | None
) -> tuple[dict[str, Tensor], list[tuple[TensorPart | None, str, Tensor]]]:
    """The numbers of one packed row, and each local parameter's part, name and gradient; partial
    ones summed."""
    model = copy.deepcopy(whole)
    use_sequence_attention(model, fused=True)
    scored = ScoredModel(model, Head.lm)
    parts: dict[str, TensorPart] = {}
    if mesh is not None:
        parts = parallelize(model, mesh)
        scored.split_vocabulary(mesh.get_group())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (1, sum(LENGTHS)), generator=generator)
    reads = torch.arange(sum(LENGTHS) - 1)
    weights = torch.randn(len(reads), generator=generator)
    packing = packing_of(LENGTHS)
    numbers = scored(ids, reads, ids[0, 1:], packing=packing, entropy=True, temperature=0.8)
    ((numbers["log_probs"] + 0.1 * numbers["entropy"]) * weights).sum().backward()
    gradients: list[tuple[TensorPart | None, str, Tensor]] = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        part = parts.get(name)
        if part is not None and part.partial:
            dist.all_reduce(parameter.grad)
        gradients.append((part, name, parameter.grad))
    return {name: value.detach() for name, value in numbers.items()}, gradients


def split_differences(rank: int, root: Path, models: list[tuple[str, int, bool]]) -> None:
    """A job of threed_workers: largest_difference of odd_model(*model) over all ranks."""
    size = dist.get_world_size()
    mesh = DeviceMesh("cpu", torch.arange(size), mesh_dim_names=("tp",))
    differences = {}
    for family, kv_heads, tied in models:
        model = odd_model(family, kv_heads=kv_heads, tied=tied)
        largest = torch.tensor(largest_difference(model, mesh))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        differences[family, kv_heads, tied] = float(largest)
    if rank == 0:
        torch.save(differences, root / f"differences-{size}.pt")


def largest_difference(whole: PreTrainedModel, mesh: DeviceMesh) -> float:
    """Between this rank's numbers and gradients and those of one process, relative to the largest
    number of each tensor; every parameter must be covered by the parts of all ranks."""
    expected, whole_gradients = passed(whole, None)
    numbers, gradients = passed(whole, mesh)
    differences = [_difference(numbers[name], expected[name]) for name in expected]
    by_name = {name: gradient for _, name, gradient in whole_gradients}
    seen = {name: torch.zeros_like(gradient) for name, gradient in by_name.items()}
    for part, _, gradient in gradients:
        assert part is not None
        differences.append(_difference(gradient, part.of(by_name[part.name])))
        part.of(seen[part.name]).add_(1.0)
    for name, counts in seen.items():
        dist.all_reduce(counts)
        assert bool((counts >= 1).all()), f"{name} is not whole"
    return max(differences)


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return float((found - expected).abs().max()) / scale if expected.numel() else 0.0
