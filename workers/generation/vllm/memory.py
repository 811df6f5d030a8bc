"""The memory of a vLLM engine: replacing its weights by full tensors, and giving memory back while
training.

Resharding from shards to shards is not here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def model_runner(llm: LLM) -> GPUModelRunner:
    """The object that holds the model and its key/value cache (of this rank)."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@torch.no_grad()
def reload_weights(llm: LLM, weights: Iterable[tuple[str, torch.Tensor]], *, tied: bool) -> None:
    """Replace all weights by full tensors under checkpoint names; every rank keeps its part.

    Raises ValueError, with the modules' names, if a tensor that the model needs was not among
    `weights`.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model = model_runner(llm).get_model()
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(with_head(weights) if tied else weights)
        incomplete = incomplete_modules(model)
        finalize_layerwise_reload(model, llm.model_config)
    if incomplete:
        raise ValueError(
            f"load_weights: the tensors given do not fill {', '.join(incomplete)}; pass every "
            "parameter of the model"
        )


def with_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tied embeddings a second time as the head: on CPU vLLM keeps a repacked copy that
    only its own name refreshes."""
    for name, tensor in weights:
        if name == "lm_head.weight":
            continue  # the same tensor, given under both names
        yield name, tensor
        if name.endswith("embed_tokens.weight"):
            yield "lm_head.weight", tensor


def incomplete_modules(model: nn.Module) -> list[str]:
    """Names of modules that have not got all their elements since initialize_layerwise_reload."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    names = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if (
            not info.can_load()
            or not info.load_numel_total
            or not list(module.parameters(recurse=False))
        ):
            continue  # complete, or with nothing that a checkpoint has (rotary tables, scales of the cache)
        # The vocabulary is padded to a multiple of 64.
        padded = isinstance(module, VocabParallelEmbedding) and info.load_numel > 0
        if info.load_numel < info.load_numel_total and not padded:
            names.append(name)
    return names


class EngineMemory(ABC):
    """Frees and takes back an engine's memory: release, take_back_weights, (fill them),
    weights_filled, ready."""

    @abstractmethod
    def release(self) -> int:
        """Free weights and key/value cache, and say how many bytes that were; nothing to do if
        they are free."""

    @abstractmethod
    def take_back_weights(self) -> None:
        """Memory for weights again, contents undefined; nothing to do if it is there."""

    @abstractmethod
    def take_back_cache(self) -> None:
        """Memory for the key/value cache again; after the weights are filled, so that their
        transfer has that memory."""


class CpuMemory(EngineMemory):
    """Storages are resized in place to nothing and back, so that every view of them stays what
    it is."""

    def __init__(self, llm: LLM) -> None:
        self._runner = model_runner(llm)
        self._weights: list[tuple[torch.UntypedStorage, int]] = []
        self._cache: list[tuple[torch.UntypedStorage, int]] = []

    def release(self) -> int:
        if self._weights:
            return 0
        model = self._runner.get_model()
        self._weights = free(parameter.untyped_storage() for parameter in model.parameters())
        # A cache that nothing was generated with since the last release is free already.
        cache = free(layer.untyped_storage() for layer in self._runner.kv_caches)
        self._cache += cache
        for module in model.modules():
            if "cpu_linear" in module.__dict__:
                # vLLM's repacked copy of the weights, not counted: oneDNN does not say how large it
                # is. Filling them makes a new one.
                module.cpu_linear = None
        return sum(size for _, size in (*self._weights, *cache))

    def take_back_weights(self) -> None:
        take_back(self._weights)
        self._weights = []

    def take_back_cache(self) -> None:
        take_back(self._cache)
        self._cache = []


def plain_tensors(model: nn.Module, cache: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that modules and their attention kernels have beside parameters, buffers and
    `cache`, such as the slopes of ALiBi: vLLM's sleep frees them with the weights and keeps buffers
    alone."""
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in cache}
    for tensor in (*model.parameters(), *model.buffers()):
        elsewhere.add(tensor.untyped_storage().data_ptr())
    result = []
    for module in model.modules():
        attributes = dict(vars(module))
        kernel = attributes.get("impl")
        if kernel is not None:
            attributes |= {f"impl.{name}": value for name, value in vars(kernel).items()}
        attributes.pop("kv_cache", None)
        for value in attributes.values():
            if isinstance(value, torch.Tensor) and value.numel():
                storage = value.untyped_storage().data_ptr()
                if storage not in elsewhere:
                    elsewhere.add(storage)
                    result.append(value)
    return result


class CudaMemory(EngineMemory):
    """vLLM's own sleep mode, at the level that keeps neither weights nor cache; buffers are kept,
    and here the plain tensors of modules."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._free: set[str] = set()
        self._plain: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Plain tensors, and what they held when the weights were freed."""

    def release(self) -> int:
        if "weights" in self._free:
            return 0
        runner = model_runner(self._llm)
        tensors = plain_tensors(runner.get_model(), runner.kv_caches)
        self._plain = [(tensor, tensor.detach().cpu()) for tensor in tensors if tensor.is_cuda]
        before, _ = torch.cuda.mem_get_info()
        self._llm.sleep(level=2, mode="keep")  # "abort" would lose the rows in flight
        self._free = {"weights", "kv_cache"}
        return torch.cuda.mem_get_info()[0] - before

    def take_back_weights(self) -> None:
        self._wake("weights")

    def take_back_cache(self) -> None:
        self._wake("kv_cache")

    def _wake(self, tag: str) -> None:
        if tag in self._free:
            self._llm.wake_up(tags=[tag])
            self._free.remove(tag)
        if tag == "weights":
            for tensor, held in self._plain:
                tensor.detach().copy_(held)
            self._plain = []


def free(storages: Iterable[torch.UntypedStorage]) -> list[tuple[torch.UntypedStorage, int]]:
    """Resize to nothing; returns what take_back needs. Storages may come several times."""
    sizes = {
        storage.data_ptr(): (storage, storage.nbytes()) for storage in storages if storage.nbytes()
    }
    for storage, _ in sizes.values():
        storage.resize_(0)
    return list(sizes.values())


def take_back(sizes: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    """Resize to the former size, filled with zeros (attention multiplies unused cache entries
    by zero: they must be numbers)."""
    for storage, size in sizes:
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
