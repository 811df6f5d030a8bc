"""TensorPart: what a tensor rank's parameter is of a parameter of the checkpoint.

Checkpoints, exports, digests and resharding see the checkpoint's parameters; a tensor rank holds
one box of each, or several local parameters where the checkpoint fuses projections that are split
one by one. Nothing here is padded: parts of sizes that do not divide differ by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hybridflow.resharding.shards import Box


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPart:
    """The keys' rows of a fused projection of 6 query heads and 2 key-value heads of 32, on the
    first of two tensor ranks:

    TensorPart(name="model.layers.0.self_attn.qkv_proj.weight", shape=(320, 192),
               box=Box((192, 0), (32, 192)))
    """

    name: str
    """The checkpoint's name; of tied parameters the first."""
    shape: tuple[int, ...]
    """The shape in the checkpoint."""
    box: Box
    replicated: bool = False
    """Every tensor rank holds the same box."""
    partial: bool = False
    """Replicated, and the gradient is the sum of what the tensor ranks compute."""
    divided: bool = False
    """Experts that are divided over data ranks too (expert_parallel.py)."""

    def of(self, whole: Tensor) -> Tensor:
        """A view of this part of the checkpoint's tensor."""
        return whole[self.box.slices]


Parts = Mapping[str, TensorPart]
"""By the name of the local parameter."""


def whole_parts(model: nn.Module, *, replicated: bool = False) -> dict[str, TensorPart]:
    """Every parameter of `model` as it is, tied ones under each of their names."""
    first: dict[int, str] = {}
    parts = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        parts[name] = TensorPart(
            name=first.setdefault(id(parameter), name),
            shape=shape,
            box=Box((0,) * len(shape), shape),
            replicated=replicated,
        )
    return parts
