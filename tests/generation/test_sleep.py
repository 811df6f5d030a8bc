"""The memory of a vLLM engine on a CPU between generations, without vLLM: sizes before and after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from workers.generation.vllm.memory import CpuMemory


def sizes(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def test_an_engine_that_slept_twice_before_it_generated_has_its_cache_again() -> None:
    """An actor's engine sleeps while the trainer is built, wakes for its weight destination, and
    sleeps again (finding 13): the cache, which nobody took back meanwhile, is not lost."""
    model, cache = nn.Linear(8, 4), torch.ones(2, 16)
    runner = SimpleNamespace(get_model=lambda: model, kv_caches=[cache])
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    executor = SimpleNamespace(driver_worker=worker)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
    memory = CpuMemory(cast(Any, llm))
    tensors = [model.weight, model.bias, cache]
    whole = sizes(tensors)
    assert memory.release() == sum(whole)
    assert memory.release() == 0
    memory.take_back_weights()
    assert sizes(tensors) == [*whole[:2], 0]
    assert memory.release() == sum(whole[:2])
    assert sizes(tensors) == [0, 0, 0]
    memory.take_back_weights()
    memory.take_back_cache()
    assert sizes(tensors) == whole
    assert bool((cache == 0).all())
