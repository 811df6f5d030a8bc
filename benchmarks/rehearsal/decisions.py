"""Stage C: what vLLM decides on a GPU for what hybridflow tells it; one process for each GPU.

    python -m benchmarks.rehearsal.decisions DIRECTORY H100 [CASE ...]

Prints a JSON list of rows, one for each model and precision: attention kernels, CUDA graphs, blocks
of the cache, kernels of experts, whether sleeping has its allocator, and what becomes of the weights
after loading. The engine's settings are those of build_llm; the models are vLLM's own classes, on
tensors without data.
"""

from __future__ import annotations

# isort: off
import sys
from pathlib import Path

from benchmarks.rehearsal import cuda_vllm

if __name__ == "__main__":
    cuda_vllm.become_cuda_vllm(cuda_vllm.GPUS[sys.argv[2]], Path(sys.argv[1], "wheel"))
# isort: on

import json
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    DeepseekV2Config,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from benchmarks.rehearsal.hollow import Hollow
from workers.config import ModelConfig, Precision
from workers.generation.config import GenerationConfig
from workers.generation.vllm.groups import build_vllm_groups
from workers.generation.vllm.setup import ENVIRONMENT, build_llm
from workers.generation.vllm.weights import VllmWeights

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "intermediate_size": 256,
    "tie_word_embeddings": False,
}
LATENT = SIZES | {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
MODELS: dict[str, PretrainedConfig] = {
    "dense": Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"]),
    "heads of 80": LlamaConfig(**SIZES, head_dim=80, architectures=["LlamaForCausalLM"]),
    "soft-capped, heads of 256": Gemma2Config(
        **(SIZES | {"tie_word_embeddings": True}),
        head_dim=256,
        architectures=["Gemma2ForCausalLM"],
    ),
    "latent": DeepseekV2Config(
        **LATENT, first_k_dense_replace=2, architectures=["DeepseekV2ForCausalLM"]
    ),
    "latent with experts": DeepseekV2Config(
        **LATENT, first_k_dense_replace=1, architectures=["DeepseekV2ForCausalLM"]
    ),
    "experts": Qwen3MoeConfig(
        **SIZES,
        head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        architectures=["Qwen3MoeForCausalLM"],
    ),
}


@dataclass(kw_only=True)
class Decision:
    """What vLLM makes of one model on one GPU; `error` is its refusal."""

    gpu: str
    model: str
    precision: str
    attention: list[str] | None = None
    graphs: str = ""
    captured_sizes: int = 0
    block_size: int = 0
    experts: str = ""
    sleeps: bool = False
    reshaped: list[str] | None = None
    """Parameters whose shape or strides are others after loading."""
    replaced: list[str] | None = None
    """Parameters whose memory is another one after loading."""
    parameters: int = 0
    staged: int | None = None
    """Tensors that a sync can't write in place."""
    error: str = ""


def engine_arguments(path: Path, config: GenerationConfig, model: PretrainedConfig) -> Any:
    """EngineArgs as vllm.LLM makes them of what build_llm passes on."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    passed: dict[str, Any] = {}
    vars(vllm)["LLM"] = lambda name, **options: passed.update(options, model=name)
    build_llm(ModelConfig(path=str(path)), config, model, load_weights=False, cuda=True)
    known = {field.name for field in fields(EngineArgs)}
    assert set(passed) <= known, sorted(set(passed) - known)
    return EngineArgs(**passed)


def decide(
    directory: Path, gpu: str, name: str, config: GenerationConfig, kind: str = ""
) -> Decision:
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    row = Decision(gpu=gpu, model=kind or name, precision=config.precision.value)
    path = directory / name.replace(" ", "-").replace(",", "")
    MODELS[name].save_pretrained(path)
    try:
        arguments = engine_arguments(path, config, MODELS[name])
        engine = arguments.create_engine_config(UsageContext.LLM_CLASS)
        row.sleeps = engine.model_config.enable_cumem_allocator
        with set_current_vllm_config(engine):
            model = built_model(engine)
            after_loading(model, engine, row)
            current_platform.update_block_size_for_backend(engine)
            row.block_size = engine.cache_config.block_size
            attention_of(engine, row)
            row.experts = ", ".join(sorted(experts_of(model)))
            resolve_graphs(engine, row)
            row.staged = staged_tensors(model, engine)
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return row


def built_model(engine: Any) -> nn.Module:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(engine.model_config.dtype), torch.device("cuda"):
        model: nn.Module = initialize_model(vllm_config=engine)
    return model


def after_loading(model: nn.Module, engine: Any, row: Decision) -> None:
    """What process_weights_after_loading does to the parameters that loaders have filled."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    before = {}
    for name, parameter in model.named_parameters():
        before[name] = (parameter, tuple(parameter.shape), parameter.stride())
    row.parameters = len(before)
    process_weights_after_loading(model, engine.model_config, torch.device("cuda"))
    after = dict(model.named_parameters())
    row.reshaped, row.replaced = [], []
    for name, (parameter, shape, stride) in before.items():
        now = after.get(name)
        if now is None or (tuple(now.shape), now.stride()) != (shape, stride):
            row.reshaped.append(name)
        elif storage_of(now) != storage_of(parameter):
            row.replaced.append(name)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def attention_of(engine: Any, row: Decision) -> None:
    from vllm.platforms.interface import Platform

    names = [backend.get_name() for backend in Platform._find_non_ssm_backends(engine)]
    row.attention = sorted(names)


def resolve_graphs(engine: Any, row: Decision) -> None:
    """As the model runner does when the kernels of attention are known."""
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionCGSupport

    support, weakest = AttentionCGSupport.ALWAYS, None
    for layer in get_layers_from_vllm_config(engine, AttentionLayerBase).values():
        backend = layer.get_attn_backend()
        spec = layer.get_kv_cache_spec(engine)
        supported = backend.get_builder_cls().get_cudagraph_support(engine, spec)
        if supported.value < support.value:
            support, weakest = supported, backend.__name__
    mode = engine.compilation_config.resolve_cudagraph_mode_and_sizes(
        support, weakest, 1, use_v2_model_runner=False, is_profiling=True
    )
    row.graphs = mode.name
    row.captured_sizes = len(engine.compilation_config.cudagraph_capture_sizes or ())


def experts_of(model: nn.Module) -> set[str]:
    kinds = set()
    for module in model.modules():
        method = vars(module).get("quant_method") or module._modules.get("quant_method")
        if type(method).__name__ == "UnquantizedFusedMoEMethod":
            kinds.add(method.unquantized_backend.value)
    return kinds


def staged_tensors(model: nn.Module, engine: Any) -> int:
    """Tensors for which VllmWeights needs memory beside the engine's; its LoaderError where it can't
    say where a weight lies."""
    runner = SimpleNamespace(get_model=lambda: model)
    executor = SimpleNamespace(driver_worker=SimpleNamespace())
    executor.driver_worker.worker = SimpleNamespace(model_runner=runner)
    llm: Any = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=engine, model_executor=executor)
    )
    return len(VllmWeights(llm)._staged)


def peer_facts() -> dict[str, Any]:
    """What custom all-reduce would meet: peers of a process that sees its own GPU only (the default
    under Ray) and of one that sees all, and whether NVLink connects four."""
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.custom_all_reduce import _can_p2p
    from vllm.platforms import current_platform

    torch.cuda.can_device_access_peer = lambda device, peer: True  # type: ignore[assignment]
    facts: dict[str, Any] = {"custom_all_reduce": parallel_state._ENABLE_CUSTOM_ALL_REDUCE}
    for visible in ("3", "0,1,2,3,4,5,6,7"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        try:
            facts[visible] = _can_p2p(0, 2)
        except IndexError as error:
            facts[visible] = f"IndexError: {error}"
    del os.environ["CUDA_VISIBLE_DEVICES"]
    facts["nvlink"] = current_platform.is_fully_connected([0, 1, 2, 3])
    return facts


def main(directory: Path, gpu: str, *chosen: str) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    os.environ.update(ENVIRONMENT, VLLM_LOGGING_LEVEL="ERROR")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    build_vllm_groups([[[0]]])
    bf16 = GenerationConfig(precision=Precision.bf16, release_during_training=True)
    fp32 = GenerationConfig(precision=Precision.fp32)
    eager = GenerationConfig(precision=Precision.bf16, enforce_eager=True)
    cases: dict[str, Callable[[], Decision]] = {}
    for name in MODELS:
        cases[name] = lambda name=name: decide(directory, gpu, name, bf16)  # type: ignore[misc]
        cases[f"{name}, fp32"] = lambda name=name: decide(directory, gpu, name, fp32)  # type: ignore[misc]
    cases["dense, eager"] = lambda: decide(directory, gpu, "dense", eager, "dense, eager")
    rows = [peer_facts() | {"gpu": gpu, "model": ""}]
    with Hollow():
        for name, case in cases.items():
            if not chosen or name in chosen:
                rows.append(asdict(case()))
    return rows


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
    sys.stdout.flush()
    os._exit(0)
