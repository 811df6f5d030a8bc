"""Point-to-point messages between the ranks of a group: what execute needs of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]
"""(rank of the peer in the group, uint8 tensor that is contiguous)."""


class Transport(Protocol):
    """post() starts messages and returns one function per received message and one for all sent; each blocks until done.

    Messages between two ranks arrive in the order in which both sides post them.
    """

    rank: int

    def post(self, receives: Sequence[Message], sends: Sequence[Message]) -> tuple[list[Callable[[], None]], Callable[[], None]]: ...


class GroupTransport:
    """A torch.distributed group, gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0

    def post(self, receives: Sequence[Message], sends: Sequence[Message]) -> tuple[list[Callable[[], None]], Callable[[], None]]:
        operations = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives]
        operations += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends]
        works = dist.batch_isend_irecv(operations) if operations else []
        # NCCL returns one work for the whole batch.
        one_each = len(works) == len(operations)
        waits = [_waiter([work]) for work in works] if one_each else [_waiter(works)] * len(operations)

        def wait_sent() -> None:
            for wait in waits[len(receives) :]:
                wait()

        return waits[: len(receives)], wait_sent


def _waiter(works: list[dist.Work]) -> Callable[[], None]:
    def wait() -> None:
        for work in works:
            work.wait()

    return wait
