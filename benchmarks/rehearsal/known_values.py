"""Values of integers on the hollow GPU (hollow.py) that follow from the host's: lengths, positions,
masks. What depends on them, like the length of a nonzero(), is then what it would be on a GPU. Two
things are assumed: routers choose experts in turn, and other ranks have the numbers of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

MOST_KNOWN = 1 << 14
"""Numbers of a tensor that an operation's values are computed for."""
ATEN = torch.ops.aten
FACTORIES = (ATEN.arange, ATEN.zeros, ATEN.ones, ATEN.full, ATEN.scalar_tensor)


class Known:
    """known.put(device_tensor, host_tensor); known.follow(func, args, options, result);
    known.get(result)"""

    def __init__(self) -> None:
        self._values = WeakIdKeyDictionary()

    def get(self, tensor: Tensor) -> Tensor | None:
        value: Tensor | None = self._values.get(tensor)
        return value

    def put(self, tensor: Tensor, value: Tensor) -> None:
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            self._values[tensor] = value

    def follow(
        self, func: Any, args: Sequence[Any], options: Mapping[str, Any], result: Any
    ) -> None:
        """Computes the values of `result`, which func(*args, **options) has given, on the host."""
        if func.namespace == "c10d":
            self._exchanged(func, args)
            return
        if func.overloadpacket is ATEN.topk:
            self._in_turn(args, result)
            return
        values = self.compute(func, args, options)
        if values is None:
            if func._schema.is_mutable:
                for written in pytree.tree_leaves(args[:1]):
                    if isinstance(written, FakeTensor):
                        self.forget(written)
            return
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(values), strict=True)
        for tensor, value in pairs:
            if isinstance(tensor, FakeTensor) and isinstance(value, Tensor):
                self.put(tensor, value)

    def compute(self, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """func(*args, **options) on the host; None where it depends on what is not known, or is
        much. Of a function that writes, what it writes to is up to date afterwards."""
        leaves = pytree.tree_leaves((args, dict(options)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not tensors and func.overloadpacket not in FACTORIES:
            return None
        if "empty" in func.overloadpacket.__name__:
            return None
        if any(self.get(fake) is None for fake in fakes):
            return None
        if any(tensor.dtype.is_floating_point for tensor in tensors):
            return None
        if not func.is_view and sum(fake.numel() for fake in fakes) > MOST_KNOWN:
            return None
        if not tensors and func.overloadpacket is ATEN.arange and max(args, default=0) > MOST_KNOWN:
            return None

        def host(leaf: Any) -> Any:
            if isinstance(leaf, FakeTensor):
                return self.get(leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        host_args, host_options = pytree.tree_map(host, (tuple(args), dict(options)))
        try:
            return func(*host_args, **host_options)
        except NotImplementedError:  # an operation that CPUs have not for these types
            return None

    def _exchanged(self, func: Any, args: Sequence[Any]) -> None:
        name = func.overloadpacket.__name__
        if name == "alltoall_base_":
            output, value = args[0], self.get(args[1])
            if value is not None and output.shape == args[1].shape:
                self.put(output, value.clone())
            else:
                self.forget(output)
        elif name.startswith(("allreduce", "reduce")):
            for tensor in pytree.tree_leaves(args):
                if isinstance(tensor, FakeTensor):
                    self.forget(tensor)

    def _in_turn(self, args: Sequence[Any], result: Any) -> None:
        indices, among = result[1], args[0].shape[-1]
        if indices.dim() == 2 and indices.numel() <= MOST_KNOWN:
            rows, chosen = (torch.arange(size) for size in indices.shape)
            self.put(indices, (rows[:, None] + chosen) % among)

    def written(self, into: Tensor, source: Tensor) -> None:
        """A host tensor was copied into `into`."""
        value = self.get(into)
        if source.dtype.is_floating_point:
            self.forget(into)
        elif value is not None:
            value.copy_(source)
        else:
            self.put(into, source.expand(into.shape).to(into.dtype, copy=True))

    def forget(self, written: Tensor) -> None:
        """It was written to with what is not known."""
        value = self.get(written)
        if value is None:
            return
        memory = value.untyped_storage().data_ptr()
        for tensor, other in list(self._values.items()):
            if other.untyped_storage().data_ptr() == memory:
                del self._values[tensor]
