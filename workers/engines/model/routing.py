"""Routing: what the routers of a mixture of experts need to know about one pass.

It travels with the micro-batch through the model's forward code as a keyword argument, as Packing
does, so that a layer that is recomputed in the backward pass finds that of its own micro-batch. How
routers use it is in routers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Rows [5, 6, 7, 8] and [5, 6, 4], which share 5 and 6, packed as [5 6 7 8 4]:

    routing_of(rows=tensor([0, 0, 0, 0, 1, 1, 1]), columns=tensor([0, 1, 2, 3, 0, 1, 2]),
               places=tensor([0, 1, 2, 3, 0, 1, 4]), num_tokens=5).row_counts = [2, 2, 1, 1, 1]
    """

    rows: Tensor
    """int64 [computed tokens of all rows]: the row of each, as the micro-batch numbers them."""
    columns: Tensor
    """int64 [computed tokens of all rows]: the place of each in its row."""
    places: Tensor
    """int64 [computed tokens of all rows]: where each token of each row is in the flat input ids."""
    row_counts: Tensor
    """float64 [tokens of the pass]: how many rows each token belongs to; 0 for padding."""
    row_routes: Tensor | None = None
    """int16 [computed tokens of all rows, layers, experts per token]: the experts that each token
    goes to, by layer with experts; -1 where the router decides."""
    routes: Tensor | None = None
    """int16 [tokens of the pass, layers, experts per token]: the same for the tokens of the pass."""
    seen: set[int] = field(default_factory=set)
    """Layers that have counted this pass: one that is recomputed does not count twice."""
    chosen: dict[int, Tensor] = field(default_factory=dict)
    """By layer: int16 [tokens of the pass, experts per token], where routes are recorded."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Routing:
        """The same on another device, before a pass."""
        return replace(
            self,
            places=move(self.places),
            row_counts=move(self.row_counts),
            row_routes=None if self.row_routes is None else move(self.row_routes),
            routes=None if self.routes is None else move(self.routes),
        )

    def padded(self, time: int, missing: int) -> Routing:
        """The same when `missing` columns of padding follow each row of `time` input ids."""
        rows = len(self.row_counts) // time
        places = self.places + torch.div(self.places, time, rounding_mode="floor") * missing
        num_tokens = rows * (time + missing)
        return routing_of(self.rows, self.columns, places, num_tokens, self.row_routes)

    def shared(self, place_of: Tensor, num_tokens: int) -> Routing:
        """The routing of the `num_tokens` tokens of a row that one rank computes; `place_of` int64
        [tokens of the row]: where each token is among them, -1 for those of other ranks."""
        places = place_of[self.places]
        here = places >= 0
        routes = None if self.row_routes is None else self.row_routes[here]
        return routing_of(self.rows[here], self.columns[here], places[here], num_tokens, routes)

    def recorded(self, layers: int, experts_per_token: int) -> Tensor:
        """int16 [computed tokens of all rows, layers, experts per token]: where each token went; -1
        in layers that did not run here."""
        result = self.places.new_full((len(self.places), layers, experts_per_token), -1)
        result = result.to(torch.int16)
        for layer, chosen in self.chosen.items():
            result[:, layer] = chosen[self.places]
        return result


def routing_of(
    rows: Tensor,
    columns: Tensor,
    places: Tensor,
    num_tokens: int,
    row_routes: Tensor | None = None,
) -> Routing:
    """The routing of a pass over `num_tokens` input ids. Rows that share a token have the same
    routes for it."""
    # Not bincount: its length depends on the values, so that the host would wait for the device.
    one = torch.ones((), dtype=torch.float64, device=places.device)
    row_counts = one.new_zeros(num_tokens).index_add_(0, places, one.expand(len(places)))
    routes = None
    if row_routes is not None:
        routes = row_routes.new_full((num_tokens, *row_routes.shape[1:]), -1)
        routes[places] = row_routes
    return Routing(rows, columns, places, row_counts, row_routes, routes)
