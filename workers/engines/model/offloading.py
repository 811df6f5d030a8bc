"""Activations in host memory: what the backward pass needs of the decoder leaves the device while the
forward pass goes on, and comes back before its layer's turn.

    offload_activations(model)   # once; every pass with gradients from then on

On a GPU copies run on a stream of their own through page-locked memory; what is needed next is on its
way while the backward pass computes. With activation checkpointing it is the layers' inputs that
move. Weights and small tensors stay. On a CPU tensors are only copied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

SMALLEST_BYTES = 2**16
"""A smaller tensor is not worth a copy."""
AHEAD = 8
"""Tensors that are brought back before they are asked for: about what one layer has."""


def offload_activations(model: PreTrainedModel) -> None:
    """From now on every pass of the decoder of `model` keeps what it stores in host memory."""
    base, passes = model.base_model, list[saved_tensors_hooks]()
    mover = Mover()

    def begin(_module: nn.Module, _arguments: Any) -> None:
        hooks = Pass(mover)
        passes.append(saved_tensors_hooks(hooks.pack, hooks.unpack))
        passes[-1].__enter__()

    def end(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        passes.pop().__exit__()

    base.register_forward_pre_hook(begin)
    base.register_forward_hook(end, always_call=True)


class Mover:
    """Copies between a device and host memory, on a stream of its own where the device has some."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self.moved_bytes = 0
        """To host memory, since it was made."""

    def out(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, under way."""
        self.moved_bytes += tensor.numel() * tensor.element_size()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        with self._beside(tensor.device):
            host.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """A copy on `device`, under way, and the event of its end."""
        with self._beside(device):
            tensor = torch.empty(host.shape, dtype=host.dtype, device=device)
            tensor.copy_(host, non_blocking=True)
            return tensor, None if self._stream is None else self._stream.record_event()

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)


@dataclass(slots=True)
class Stored:
    """A tensor in host memory."""

    host: Tensor
    device: torch.device
    number: int
    """Among those of its pass."""
    uses: int = 0
    """How often it will be asked for."""
    tensor: Tensor | None = None
    """Back on the device."""
    arrived: Any = None


@dataclass(slots=True)
class Pass:
    """The tensors that one forward pass stores; several passes may be alive in a pipeline."""

    mover: Mover
    stored: list[Stored] = field(default_factory=list)
    known: dict[tuple[Any, ...], tuple[StorageWeakRef, Stored]] = field(default_factory=dict)
    """By memory and shape: queries, keys and values all store the input of their products."""

    def pack(self, tensor: Tensor) -> Tensor | tuple[Stored, torch.Size]:
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if is_weight or tensor.numel() * tensor.element_size() < SMALLEST_BYTES:
            return tensor
        shape, flat = tensor.shape, tensor.detach()
        if flat.is_contiguous():
            flat = flat.view(-1)
        memory = StorageWeakRef(tensor.untyped_storage())
        layout = (flat.storage_offset(), flat.shape, flat.stride(), flat.dtype)
        key = (memory.cdata, tensor._version, *layout)
        entry = self.known.get(key)
        if entry is None or entry[0].expired():
            entry = memory, Stored(self.mover.out(flat), tensor.device, len(self.stored))
            self.known[key] = entry
            self.stored.append(entry[1])
        entry[1].uses += 1
        return entry[1], shape

    def unpack(self, packed: Tensor | tuple[Stored, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        stored, shape = packed
        for number in range(stored.number, max(stored.number - AHEAD, 0) - 1, -1):
            self._fetch(self.stored[number])
        tensor = stored.tensor
        assert tensor is not None, "a stored tensor was asked for more often than it was stored"
        if stored.arrived is not None:
            now = torch.cuda.current_stream(stored.device)
            now.wait_event(stored.arrived)
            tensor.record_stream(now)
        stored.uses -= 1
        if not stored.uses:
            stored.tensor = None
        return tensor.view(shape)

    def _fetch(self, stored: Stored) -> None:
        if stored.tensor is None and stored.uses:
            stored.tensor, stored.arrived = self.mover.back(stored.host, stored.device)
