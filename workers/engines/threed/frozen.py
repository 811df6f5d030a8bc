"""The base of an adapter: parameters without gradients, master weights and optimizer states.

They are in the compute dtype, each in memory of its own, so that engines of one pool whose bases are
equal have them in memory once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridflow.resharding.shards import Box
from workers.engines.threed.optimizer import FlatSlice


@dataclass(frozen=True, slots=True)
class FrozenPart:
    """This rank's part of a frozen parameter."""

    piece: FlatSlice
    tensor: Tensor


class FrozenParts:
    """frozen = FrozenParts(pieces, torch.bfloat16, lent)
    frozen.fill("model.norm.weight", values)        # for every parameter, once
    """

    def __init__(
        self, pieces: Sequence[FlatSlice], dtype: torch.dtype, lent: Iterable[FrozenPart]
    ) -> None:
        self.parts: list[FrozenPart] = []
        self._dtype = dtype
        self._pieces: dict[str, list[FlatSlice]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.name, []).append(piece)
        self._lent: dict[tuple[str, Box], Tensor] = {}
        for part in lent:
            self._lent[part.piece.name, part.piece.box] = part.tensor

    def fill(self, name: str, whole: Tensor) -> None:
        """Gives the parts of a parameter their values; nothing to do for one that is not here."""
        for piece in self._pieces.get(name, ()):
            # A copy, because a view would keep the whole parameter alive.
            value = whole[piece.box.slices].to(self._dtype, copy=True)
            lent = self._lent.get((name, piece.box))
            if lent is not None and lent.dtype is value.dtype and torch.equal(lent, value):
                value = lent
            parameter = nn.Parameter(value, requires_grad=False)
            for module, attribute in piece.places:
                module._parameters[attribute] = parameter
            self.parts.append(FrozenPart(piece, value))
