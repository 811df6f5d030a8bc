"""Stage C of the rehearsal: what vLLM is told on GPUs, by a recorder in its place (docs/gpu.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from hybridflow.context import RankContext
from hybridflow.devices import ALLOCATOR, ALLOCATOR_BEFORE, GROWING_SEGMENTS
from workers.config import ModelConfig, Precision
from workers.generation.config import GenerationConfig
from workers.generation.vllm.destination import VllmShards
from workers.generation.vllm.setup import build_llm, sums_through_peers, vllm_environment

ROOT = Path(__file__).parents[2]
GPU = RankContext(device="cuda:0")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keyword arguments of the last vllm.LLM."""
    recorded: dict[str, Any] = {}
    stub = ModuleType("vllm")
    vars(stub)["LLM"] = lambda model, **options: recorded.update(options)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    return recorded


@pytest.mark.parametrize("cuda", [True, False])
def test_the_device_decides_what_vllm_is_told(arguments: dict[str, Any], cuda: bool) -> None:
    """G1, G3, G8: it was torch.cuda.is_available(), true in CPU processes of a GPU machine."""
    config = GenerationConfig(release_during_training=True, precision=Precision.bf16)
    build_llm(ModelConfig(path="model"), config, Qwen2Config(), load_weights=False, cuda=cuda)
    assert arguments["enable_sleep_mode"] is cuda
    assert (arguments["kv_cache_memory_bytes"] is None) is cuda
    assert (arguments["block_size"] is None) is cuda
    assert arguments["moe_backend"] == ("triton" if cuda else "auto")
    assert arguments["disable_custom_all_reduce"] is True


@pytest.mark.parametrize("chosen", [None, True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_graphs_are_the_default_on_gpus(
    arguments: dict[str, Any], cuda: bool, chosen: bool | None
) -> None:
    """G31: a decoded token of a small model is hundreds of launches without them."""
    config = GenerationConfig(enforce_eager=chosen)
    build_llm(ModelConfig(path="model"), config, Qwen2Config(), load_weights=False, cuda=cuda)
    expected = {None: not cuda, True: True, False: False}
    assert arguments["enforce_eager"] is expected[chosen]


def test_float32_attention_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """G4."""
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    fp32 = vllm_environment(GPU, GenerationConfig(precision=Precision.fp32), fast_sum=False)
    bf16 = vllm_environment(GPU, GenerationConfig(precision=Precision.bf16), fast_sum=False)
    assert fp32["TRITON_F32_DEFAULT"] == "ieee" and "TRITON_F32_DEFAULT" not in bf16
    cpu = vllm_environment(
        RankContext(), GenerationConfig(precision=Precision.fp32), fast_sum=False
    )
    assert "TRITON_F32_DEFAULT" not in cpu


def test_tensor_parts_are_summed_by_nccl_where_a_process_sees_its_own_gpu_only() -> None:
    """G1."""
    assert not sums_through_peers(RankContext(), GenerationConfig(tp=2))
    assert not sums_through_peers(GPU, GenerationConfig(tp=2))  # no GPU is visible here
    hidden = vllm_environment(GPU, GenerationConfig(), fast_sum=False)
    assert hidden["VLLM_ALLREDUCE_USE_SYMM_MEM"] == hidden["VLLM_ALLREDUCE_USE_FLASHINFER"] == "0"
    visible = vllm_environment(GPU, GenerationConfig(), fast_sum=True)
    assert "VLLM_ALLREDUCE_USE_SYMM_MEM" not in visible


@pytest.mark.parametrize(
    ("settings", "graphs", "releases", "through_peers"),
    [
        (GROWING_SEGMENTS, True, False, False),
        (GROWING_SEGMENTS, False, False, True),
        ({ALLOCATOR: "expandable_segments:False"}, True, False, True),
        ({ALLOCATOR: "expandable_segments:False"}, True, True, False),
        ({ALLOCATOR_BEFORE: "max_split_size_mb:64, expandable_segments:True"}, True, False, False),
    ],
)
def test_graphs_open_no_memory_that_cuda_does_not_open(
    settings: dict[str, str],
    graphs: bool,
    releases: bool,
    through_peers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM registers the buffers of its graphs by cudaIpcGetMemHandle, which takes the memory of
    cudaMalloc alone, and ends the process otherwise."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in (ALLOCATOR, ALLOCATOR_BEFORE):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    config = GenerationConfig(tp=2, enforce_eager=not graphs, release_during_training=releases)
    assert sums_through_peers(GPU, config) is through_peers


class Engine:
    """What VllmShards asks of an engine."""

    def __init__(self, has_graphs: bool) -> None:
        self.has_graphs = has_graphs


class Weights:
    def __init__(self) -> None:
        self.shared = False

    def share(self, sources: object) -> None:
        self.shared = True


@pytest.mark.parametrize("has_graphs", [True, False])
def test_memory_that_graphs_hold_is_never_replaced(has_graphs: bool) -> None:
    """G5."""
    shards = VllmShards.__new__(VllmShards)
    shards.engine, shards.weights = Engine(has_graphs), Weights()  # type: ignore[assignment]
    shards.share([])
    assert shards.weights.shared is not has_graphs  # type: ignore[attr-defined]


GROUPS = """
import os
import torch
import torch.distributed as dist
from workers.generation.vllm.groups import build_vllm_groups
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from vllm.distributed import parallel_state
from vllm.platforms.interface import Platform
assert parallel_state._ENABLE_CUSTOM_ALL_REDUCE
build_vllm_groups([[[0]]])
assert not parallel_state._ENABLE_CUSTOM_ALL_REDUCE
class Cuda(Platform):
    device_control_env_var = "CUDA_VISIBLE_DEVICES"
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
try:
    Cuda.logical_device_id_to_visible_device_id(1)
except IndexError:
    print("as with one visible GPU")
os._exit(0)
"""


@pytest.mark.slow
def test_vllm_builds_its_groups_without_custom_all_reduce() -> None:
    """G1: its groups map every rank of a tensor group to a visible GPU, of which a host has one."""
    run = subprocess.run(
        [sys.executable, "-c", GROUPS], cwd=ROOT, capture_output=True, text=True, timeout=800
    )
    assert "as with one visible GPU" in run.stdout, run.stderr
