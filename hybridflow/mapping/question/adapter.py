"""AdapterSpec: the sizes of a low-rank adapter (LoRA, Hu et al. 2021) on a frozen decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """Parameters of A and B, on average over the layers.

    AdapterSpec.of(32, columns=[(4096, 4096)], rows=[(4096, 4096)])     # q_proj and o_proj
    """

    whole: float
    """Parameters of a layer that every tensor rank has: A where the layer is cut by columns, B where
    it is cut by rows."""
    cut: float
    """Parameters of a layer that are cut over the tensor ranks."""
    sent_alone: bool = True
    """A weight sync sends the adapter alone; false: the weights with the adapter merged into them."""

    @classmethod
    def of(
        cls,
        rank: int,
        *,
        columns: Iterable[tuple[float, float]],
        rows: Iterable[tuple[float, float]],
        num_layers: int = 1,
        sent_alone: bool = True,
    ) -> AdapterSpec:
        """From the (inputs, outputs) of the adapted layers that tensor parallelism cuts by columns
        and by rows: those of a decoder layer, or of all `num_layers`."""
        whole, cut = 0.0, 0.0
        for inputs, outputs in columns:
            whole += rank * inputs
            cut += rank * outputs
        for inputs, outputs in rows:
            whole += rank * outputs
            cut += rank * inputs
        return cls(whole=whole / num_layers, cut=cut / num_layers, sent_alone=sent_alone)
