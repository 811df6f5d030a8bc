"""The runs of two processes for test_vllm_weights.py: for every family an engine, two syncs, and
scores compared with transformers'.

The pool trains like FSDP (rows over both ranks, float32 masters). Generation is tp=2 on the ranks
in reverse order (so that groups are not the ones vLLM would build), pp=2, or two engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hybridflow.context import RankContext
from hybridflow.resharding import (
    AttestationError,
    Attestor,
    Box,
    Executor,
    LocalParameter,
    LocalShard,
    ShardMap,
    compile,
    verify,
)
from hybridflow.resharding.grouping import Grouping
from workers.config import ModelConfig, Precision
from workers.generation.config import GenerationConfig, SamplingConfig

if TYPE_CHECKING:
    from workers.generation.vllm.weights import VllmWeights

VOCAB = 200
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
TWO_ENGINES = Grouping((((0,),), ((1,),)))
REVERSED_TP = Grouping((((1, 0),),))
REVERSED_PP = Grouping((((1,), (0,)),))
CASES: dict[str, tuple[PretrainedConfig, Grouping, Precision]] = {
    # One key-value head: vLLM replicates it.
    "llama": (
        LlamaConfig(**SIZES, num_key_value_heads=1),
        REVERSED_TP,
        Precision.fp32,
    ),
    "qwen2 tied": (
        Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        REVERSED_PP,
        Precision.fp32,
    ),
    "qwen2 bf16": (Qwen2Config(**SIZES, num_key_value_heads=2), TWO_ENGINES, Precision.bf16),
    "qwen3 tied": (
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
        REVERSED_TP,
        Precision.fp32,
    ),
    "mistral": (
        MistralConfig(**SIZES, num_key_value_heads=2, head_dim=32),
        TWO_ENGINES,
        Precision.fp32,
    ),
    "gemma": (
        GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=32),
        TWO_ENGINES,
        Precision.fp32,
    ),
    "gemma2": (
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=32),
        REVERSED_TP,
        Precision.fp32,
    ),
    "gemma3": (
        Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=32),
        TWO_ENGINES,
        Precision.fp32,
    ),
    # 64 rows of an expert on each rank: vLLM's blocks have the shape of the matrix that they hold.
    "qwen3 experts": (
        Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=6, mlp_only_layers=[1], head_dim=32),
        REVERSED_TP,
        Precision.fp32,
    ),
    # 40 rows: vLLM pads them.
    "qwen3 experts padded": (
        Qwen3MoeConfig(
            **{**SIZES, **EXPERTS, "moe_intermediate_size": 80}, num_experts=5, head_dim=32
        ),
        REVERSED_TP,
        Precision.fp32,
    ),
    "mixtral": (
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        TWO_ENGINES,
        Precision.fp32,
    ),
}


SLOW = ("mistral", "gemma", "gemma2", "qwen3 experts padded", "mixtral")
"""Families whose layers the other cases have too."""


def run(rank: int, port: int, directory: str, names: list[str]) -> None:
    """Entry point of a process: runs the cases of those names and writes their results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {
        name: family(rank, Path(directory, name.replace(" ", "_")), *CASES[name]) for name in names
    }
    Path(directory, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def family(
    rank: int, directory: Path, config: PretrainedConfig, grouping: Grouping, precision: Precision
) -> dict[str, Any]:
    from vllm.distributed.parallel_state import destroy_model_parallel

    from workers.generation.vllm.engine import VllmEngine
    from workers.generation.vllm.groups import build_vllm_groups
    from workers.generation.vllm.weights import VllmWeights

    trainer = make_model(config)
    if rank == 0:
        trainer.save_pretrained(directory)
    dist.barrier()
    build_vllm_groups(grouping.replicas)
    settings = GenerationConfig(
        tp=grouping.tp, pp=grouping.pp, precision=precision, max_model_len=64, kv_cache_bytes=2**22
    )
    context = RankContext(rank=rank, world_size=2, local_rank=rank)
    engine = VllmEngine(
        model=ModelConfig(path=str(directory)),
        config=settings,
        context=context,
        load_weights=False,
        layout=grouping.layout,
    )
    weights = VllmWeights(engine.llm)
    sources = fsdp_like(trainer, rank)
    source, target = ShardMap.gather(sources), weights.shard_map()
    plan = compile(source, target, bucket_bytes=1 << 16)
    certificate = verify(plan)
    executor = Executor(plan, sources, weights.destinations())
    attestor = Attestor(plan.source, sources, target, weights.destinations())
    result: dict[str, Any] = {
        "gaps": [],
        "received": certificate.received_max,
        "bound": certificate.bound_max,
    }
    for step in range(2):
        change(trainer, step)
        weights.take_back_staging()
        executor.run()
        attestor.run()
        # The second time the engine has old weights: without a commit the probe must notice
        # (repacked and tied heads).
        if step == 1:
            engine.llm.reset_prefix_cache()
            result["without commit"] = gap(engine, trainer, precision, grouping)
        weights.commit()
        assert staging_left(weights) == 0, "a layer's staging memory is free once it is repacked"
        engine.llm.reset_prefix_cache()
        result["gaps"].append(gap(engine, trainer, precision, grouping))
    weights.take_back_staging()
    executor.run()
    result["fault"] = flip(weights.destinations(), attestor, rank)
    engine.close()
    destroy_model_parallel()
    return result


def staging_left(weights: VllmWeights) -> int:
    """Bytes of staging memory that are held now."""
    return sum(weights._memory[name].untyped_storage().nbytes() for name in weights._staged)


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """Weights large enough that every one of them shows in the scores; norms and biases away
    from 1 and 0."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                parameter + torch.randn_like(parameter) * 0.1
                if parameter.dim() == 1
                else parameter * 3
            )
    return model


def change(model: PreTrainedModel, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))


def fsdp_like(model: PreTrainedModel, rank: int) -> list[LocalParameter]:
    """Rows over two ranks; views, so that they follow the model."""
    result = []
    for name, parameter in model.named_parameters():
        step = -(-parameter.shape[0] // 2)
        rows = parameter.detach()[rank * step : (rank + 1) * step]
        box = Box((rank * step, *(0,) * (parameter.dim() - 1)), tuple(rows.shape))
        result.append(
            LocalParameter(name, tuple(parameter.shape), parameter.dtype, (LocalShard(box, rows),))
        )
    return result


def gap(engine: Any, trainer: PreTrainedModel, precision: Precision, grouping: Grouping) -> float:
    """Largest difference of the log-probs of greedily generated tokens to transformers'."""
    prompt = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(1)).numpy()
    sampling = SamplingConfig(greedy=True, max_response_tokens=8, ignore_eos=True)
    made = engine.generate([prompt], torch.zeros(1, dtype=torch.int64).numpy(), sampling)
    model = (
        trainer
        if precision is Precision.fp32
        else AutoModelForCausalLM.from_config(trainer.config, dtype=torch.bfloat16).eval()
    )
    if model is not trainer:
        model.load_state_dict(
            {name: tensor.bfloat16() for name, tensor in trainer.state_dict().items()}
        )
    ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(made.response_ids)])
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    expected = log_probs.gather(-1, torch.from_numpy(made.response_ids)[:, None])[:, 0]
    return float((torch.from_numpy(made.log_probs) - expected).abs().max())


def flip(held: list[LocalParameter], attestor: Attestor, rank: int) -> str:
    """A bit of rank 1's last parameter flips: the text of the error."""
    last = next(parameter for parameter in reversed(held) if parameter.shards)
    if rank == 1:
        last.shards[0].tensor.view(torch.uint8).reshape(-1)[0] ^= 1
    try:
        attestor.run()
    except AttestationError as error:
        return str(error)
    return "not noticed"
