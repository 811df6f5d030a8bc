"""What vLLM's sleep frees with the weights and does not keep (finding 29 of the GPU audit)."""

from __future__ import annotations

import torch
from torch import nn

from workers.generation.vllm.memory import plain_tensors


class Kernel:
    """An attention kernel as vLLM has it: no module."""

    def __init__(self, cache: torch.Tensor) -> None:
        self.slopes, self.scale, self.cache = torch.tensor([0.5, 0.25]), 0.1, cache[1:]


class Layer(nn.Module):
    def __init__(self, cache: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.register_buffer("table", torch.ones(4))
        self.transposed = self.weight.detach().t()
        self.range, self.again = torch.tensor([7.0]), None
        self.impl, self.kv_cache = Kernel(cache), cache


def test_plain_tensors_are_neither_weights_nor_buffers_nor_cache() -> None:
    """ALiBi's slopes are an attribute of vLLM's attention kernels; latent attention's matrices are
    views of a weight."""
    cache = torch.zeros(5, 2)
    model = nn.Sequential(Layer(cache), nn.Linear(2, 2))
    layer = model[0]
    model[1].shared = layer.range  # once
    tensors = plain_tensors(model, [cache])
    assert {id(tensor) for tensor in tensors} == {id(layer.range), id(layer.impl.slopes)}
    assert len(tensors) == 2
