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
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own, table = own.view(-1), parts.view(size, -1)
    received = own.new_empty(size, min(PIECE, len(own)))
    for begin in range(0, len(own), PIECE):
        end = min(begin + PIECE, len(own))
        arrived = received[:, : end - begin]
        under_way: list[dist.Work | None] = []
        for step in range(1, size):
            target, source = (rank + step) % size, (rank - step) % size
            under_way.append(dist.irecv(arrived[source], group=group, group_src=source))
            under_way.append(dist.isend(table[target, begin:end], group=group, group_dst=target))
        for work in under_way:
            assert work is not None, "every rank is in the group"
            work.wait()
        total = own[begin:end]
        total.copy_(table[rank, begin:end] if rank == 0 else arrived[0])
        for source in range(1, size):
            total += table[rank, begin:end] if source == rank else arrived[source]
