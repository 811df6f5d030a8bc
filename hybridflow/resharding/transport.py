"""Point-to-point messages between the ranks of a group: the network interface of execute.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

Message = tuple[int, torch.Tensor]
"""(rank of the peer in the group, uint8 tensor that is contiguous)."""


class Transport(Protocol):
    """post() starts messages and returns a function per received message and one for all that are
    sent; each function blocks until its messages are done.

    Messages between two ranks arrive in the order in which both sides post them.
    """

    rank: int

    def post(
        self, receives: Sequence[Message], sends: Sequence[Message]
    ) -> tuple[list[Callable[[], None]], Callable[[], None]]: ...


class GroupTransport:
    """A torch.distributed group, gloo or NCCL; also one that spans two pools
    (hybridflow/spanning.py)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Collective over a group with NCCL: its first operation must be one of all ranks, and
        a round need not have all of them."""
        self.group = group
        self.rank = rank_in(group)
        for device in device_kinds(group):
            usable = device.type != "cuda" or torch.cuda.is_available()
            if usable and sends_rounds_whole(group, device):
                dist.all_reduce(torch.zeros(1, device=device), group=group)

    def post(
        self, receives: Sequence[Message], sends: Sequence[Message]
    ) -> tuple[list[Callable[[], None]], Callable[[], None]]:
        tensors = [tensor for _, tensor in (*receives, *sends)]
        if tensors and sends_rounds_whole(self.group, tensors[0].device):
            wait = self._post_together(receives, sends, tensors[0].device)
            return [wait] * len(receives), wait
        works = self._start(receives, sends)

        def wait_sent() -> None:
            for work in works[len(receives) :]:
                work.wait()

        return list(map(_waiter, works[: len(receives)])), wait_sent

    def _start(self, receives: Sequence[Message], sends: Sequence[Message]) -> list[dist.Work]:
        works = [dist.irecv(tensor, group=self.group, group_src=peer) for peer, tensor in receives]
        works += [dist.isend(tensor, group=self.group, group_dst=peer) for peer, tensor in sends]
        return [work for work in works if work is not None]

    def _post_together(
        self, receives: Sequence[Message], sends: Sequence[Message], device: torch.device
    ) -> Callable[[], None]:
        """NCCL takes sends and receives of a round as one operation; posted one by one they
        would wait for each other."""
        with _coalescing_manager(self.group, device, async_ops=True) as posted:
            self._start(receives, sends)
        wait: Callable[[], None] = posted.wait
        return wait


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process' rank in `group` (None: the default group, or this process alone without
    one)."""
    if group is not None:
        return int(group.rank())
    return dist.get_rank() if dist.is_initialized() else 0


def sends_rounds_whole(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether the group's backend for `device` takes the messages of a round as one operation, as
    NCCL does and gloo does not."""
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return bool(group._get_backend(device).supports_coalescing)


def device_kinds(group: dist.ProcessGroup | None) -> list[torch.device]:
    """Kinds of devices whose tensors the group can send (None: the default group; empty where
    there is none)."""
    group = group if group is not None else dist.group.WORLD
    return list(group._device_types) if group is not None else []


def _waiter(work: dist.Work) -> Callable[[], None]:
    def wait() -> None:
        work.wait()

    return wait
