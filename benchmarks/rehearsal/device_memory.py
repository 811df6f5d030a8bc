"""Bytes that live on the hollow GPU (hollow.py): how many, the most there were, and whose they are."""

from __future__ import annotations

import collections
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

ALLOCATED_BYTES = 512
"""The smallest block of PyTorch's allocator on CUDA."""


class Memory:
    """Bytes of the storages that device tensors have, in steps of the allocator's smallest block;
    what kernels take inside and the allocator's fragments are left out."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.watched = False
        """Whether what is alive at the peak is known by where it was made."""
        self.at_peak: collections.Counter[str] = collections.Counter()
        """Bytes, by the operation and the line that made them; of a watched peak."""
        self._sizes: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._origins: dict[int, str] = {}

    def see(self, result: Any, func: Any) -> None:
        """Count the storages of the results of an operation that are new."""
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if self.watched and not self.known(storage):
                    shape = "x".join(map(str, tensor.shape))
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    self._origins[storage._cdata] = f"{func} {dtype} {shape} {_caller()}"
                self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // ALLOCATED_BYTES) * ALLOCATED_BYTES
        before = self._sizes.get(key)
        if before is None or before[1]() is not storage:
            if before is not None:
                self._forget(key)
            reference = weakref.ref(storage, lambda _: self._forget(key))
        else:
            reference = before[1]
            self.live -= before[0]
        self._sizes[key] = (size, reference)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            if self.watched:
                self._remember()

    def _remember(self) -> None:
        self.at_peak.clear()
        for key, (size, _) in self._sizes.items():
            self.at_peak[self._origins.get(key, "before")] += size

    def known(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._sizes

    def _forget(self, key: int) -> None:
        size, _ = self._sizes.pop(key)
        self._origins.pop(key, None)
        self.live -= size


def _caller() -> str:
    """The innermost line outside of PyTorch and of this folder; "" within a backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/rehearsal/" not in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
