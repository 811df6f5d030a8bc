"""Boxes and shards: the parts of logical parameters that a rank holds, and their place in its
memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A hyper-rectangle of a parameter: element i is inside if start[k] <= i[k] < start[k] +
    shape[k] for every dim k."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indexes a tensor of the whole parameter's shape."""
        ends = map(add, self.start, self.shape)
        return tuple(map(slice, self.start, ends))

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One box of a parameter and this rank's memory for it.

    LocalShard(box=Box((0, 0), (128, 64)), tensor=weight.to_local())
    """

    box: Box
    tensor: torch.Tensor
    """A view of the rank's own memory (never a copy), tensor.shape == box.shape."""


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """The shards of one logical parameter that this rank holds; none where it holds nothing of
    it."""

    name: str
    """The checkpoint's name (the key in a Hugging Face safetensors file); tied weights appear
    once, under the first name."""
    shape: tuple[int, ...]
    """Global shape."""
    dtype: torch.dtype
    shards: tuple[LocalShard, ...]

    @classmethod
    def whole(cls, name: str, tensor: torch.Tensor) -> LocalParameter:
        """A tensor that every rank has."""
        shape = tuple(tensor.shape)
        return cls(name, shape, tensor.dtype, (LocalShard(Box((0,) * len(shape), shape), tensor),))


def all_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    shards: Mapping[str, Sequence[LocalShard]],
    dtype: torch.dtype,
) -> list[LocalParameter]:
    """Every parameter of a model (name -> global shape) with the shards that this rank holds."""
    parameters = []
    for name, shape in shapes.items():
        parameters.append(LocalParameter(name, shape, dtype, tuple(shards.get(name, ()))))
    return parameters
