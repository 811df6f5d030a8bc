"""A reduce-scatter over gloo: every rank sends each other one its part, and adds what it gets.

gloo's own sums the whole tensor on every rank and drops most of it, which moves twice the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

PIECE = 1 << 22
"""Elements of a part that are under way from one rank at a time: bounds the memory for them."""


class GlooReduceScatter:
    """FSDP's ReduceScatter (FSDPModule.set_custom_reduce_scatter).

    module.set_custom_reduce_scatter(GlooReduceScatter())
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op, f"{op}: only sums are asked for"
        reduce_scatter(output_tensor, input_tensor, group)


def reduce_scatter(own: Tensor, parts: Tensor, group: ProcessGroup) -> None:
    """`own` [numel] becomes the sum over ranks of their `parts` [ranks, numel] (or flat) at this
    rank, added in the order of the ranks. Collective."""
    own, table = own.view(-1), parts.view(group.size(), -1)
    arrived = own.new_empty(len(table), min(PIECE, len(own)))
    for begin in range(0, len(own), PIECE):
        end = min(begin + PIECE, len(own))
        piece = own[begin:end], table[:, begin:end], arrived[:, : end - begin]
        PartsUnderWay(*piece, group=group).wait()


class PartsUnderWay:
    """The same of whole parts, which move meanwhile.

    sum_under_way = PartsUnderWay.begin(own, parts, group)
    ...
    sum_under_way.wait()            # own has the sum
    """

    def __init__(self, own: Tensor, table: Tensor, arrived: Tensor, *, group: ProcessGroup) -> None:
        """own [numel]; table, arrived [ranks, numel]: what goes to each rank, room for what comes."""
        self._own, self._table, self._arrived = own, table, arrived
        self._rank, size = dist.get_rank(group), len(table)
        self._moving: list[dist.Work | None] = []
        for step in range(1, size):
            target, source = (self._rank + step) % size, (self._rank - step) % size
            self._moving.append(dist.irecv(arrived[source], group=group, group_src=source))
            self._moving.append(dist.isend(table[target], group=group, group_dst=target))

    @classmethod
    def begin(cls, own: Tensor, parts: Tensor, group: ProcessGroup) -> PartsUnderWay:
        table = parts.view(group.size(), -1)
        return cls(own, table, torch.empty_like(table), group=group)

    def wait(self) -> None:
        for work in self._moving:
            assert work is not None, "every rank is in the group"
            work.wait()
        for source in range(len(self._table)):
            part = (self._table if source == self._rank else self._arrived)[source]
            if source == 0:
                self._own.copy_(part)
            else:
                self._own += part
