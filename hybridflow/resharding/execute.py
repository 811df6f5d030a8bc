"""Running a plan: pack, send, receive, unpack, in rounds; the packing of a round overlaps the
transfer of the round before.

A box that is contiguous in a rank's memory is sent from or received into that memory itself; only
the others are staged. The sender casts to the target's data type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.resharding.memory import LocalMemory, as_bytes, same_memory
from hybridflow.resharding.plan import LOCAL, MESSAGE_ALIGNMENT, ReshardingPlan
from hybridflow.resharding.shard_map import DTYPES
from hybridflow.resharding.shards import LocalParameter
from hybridflow.resharding.transport import GroupTransport, Message, Transport

ALONE_BYTES = 128 << 10
"""Boxes of at least this size are messages of their own, so that they need no staging where
they are contiguous."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionReport:
    """Time and bytes of one execution on this rank."""

    seconds: float
    received_bytes: int
    copied_bytes: int
    """Bytes copied inside the rank's memory."""
    shared_bytes: int
    """Bytes that need no copy, because source and destination are the same memory."""
    staging_bytes: int
    """Extra memory allocated."""


@dataclass(slots=True)
class _Endpoint:
    """This rank's end of a message, as sender or receiver."""

    peer: int
    views: list[torch.Tensor]
    """The boxes in this rank's memory."""
    dtypes: list[torch.dtype]
    """The data type in which each box travels."""
    num_bytes: int
    offset: int = 0
    """Place in the staging buffer."""
    direct: torch.Tensor | None = None
    """uint8 view of the box's memory where the message needs no staging."""

    def buffer(self, slot: torch.Tensor) -> torch.Tensor:
        """The uint8 memory that is sent from or received into, `slot` being the round's staging
        buffer."""
        if self.direct is not None:
            return self.direct
        return slot[self.offset : self.offset + self.num_bytes]

    def staged(self, slot: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(memory of the box, its place in the staging buffer) of every box."""
        offset = self.offset
        for view, dtype in zip(self.views, self.dtypes, strict=True):
            end = offset + view.numel() * dtype.itemsize
            yield view, slot[offset:end].view(dtype).view(view.shape)
            offset = end


@dataclass(slots=True)
class _Round:
    sends: list[_Endpoint] = field(default_factory=list)
    receives: list[_Endpoint] = field(default_factory=list)
    staged_send: int = 0
    staged_receive: int = 0

    def add(self, endpoint: _Endpoint, outgoing: bool) -> None:
        """Adds a message; it is direct where it is one contiguous box of the right data type."""
        only = endpoint.views[0] if len(endpoint.views) == 1 else None
        padded = -(-endpoint.num_bytes // MESSAGE_ALIGNMENT) * MESSAGE_ALIGNMENT
        if only is not None and only.is_contiguous() and only.dtype == endpoint.dtypes[0]:
            endpoint.direct = as_bytes(only)
            padded = 0
        if outgoing:
            endpoint.offset, self.staged_send = self.staged_send, self.staged_send + padded
            self.sends.append(endpoint)
        else:
            endpoint.offset, self.staged_receive = self.staged_receive, self.staged_receive + padded
            self.receives.append(endpoint)


class Executor:
    """A plan bound to this rank's memory; build it once where the memory stays, run it at every
    sync.

    executor = Executor(plan, engine.local_parameters(), generator.destinations())
    executor.run()      # collective over the group
    """

    def __init__(
        self,
        plan: ReshardingPlan,
        sources: Sequence[LocalParameter],
        destinations: Sequence[LocalParameter],
        group: dist.ProcessGroup | None = None,
        *,
        transport: Transport | None = None,
    ) -> None:
        self.plan = plan
        self.transport = transport if transport is not None else GroupTransport(group)
        source, destination = LocalMemory(sources), LocalMemory(destinations)
        self._locals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rounds: list[_Round] = []
        self._bind(source, destination)
        device = _device_of((*destinations, *sources))
        # Two slots per direction: one round is packed (or unpacked) while the other travels.
        send_bytes, receive_bytes = [], []
        for round_ in self._rounds:
            send_bytes.append(round_.staged_send)
            receive_bytes.append(round_.staged_receive)
        self._send_slots = _make_slots(send_bytes, device)
        self._receive_slots = _make_slots(receive_bytes, device)

    @property
    def staging_bytes(self) -> int:
        """Extra memory that the executor keeps."""
        return sum(slot.numel() for slot in (*self._send_slots, *self._receive_slots))

    def run(self) -> ExecutionReport:
        """Moves everything; returns when this rank's destinations are complete and its sources
        may change."""
        begin = perf_counter()
        with torch.no_grad():
            copied, shared, received = self._run()
        return ExecutionReport(
            seconds=perf_counter() - begin,
            received_bytes=received,
            copied_bytes=copied,
            shared_bytes=shared,
            staging_bytes=self.staging_bytes,
        )

    def _run(self) -> tuple[int, int, int]:
        sent: list[Callable[[], None]] = []
        pending = self._post(0, sent) if self._rounds else []
        copied, shared = self._copy_locals()
        received = 0
        for number, current in enumerate(self._rounds):
            if number >= 1:
                sent[number - 1]()  # its send slot is the one that the next round packs into
            following = self._post(number + 1, sent) if number + 1 < len(self._rounds) else []
            slot = self._receive_slots[number % 2]
            for endpoint, wait in zip(current.receives, pending, strict=True):
                wait()
                received += endpoint.num_bytes
                if endpoint.direct is None:
                    for view, staged in endpoint.staged(slot):
                        view.copy_(staged)
            pending = following
        if sent:
            sent[-1]()
        return copied, shared, received

    def _post(self, number: int, sent: list[Callable[[], None]]) -> list[Callable[[], None]]:
        current = self._rounds[number]
        into, out = self._receive_slots[number % 2], self._send_slots[number % 2]
        receives: list[Message] = []
        for endpoint in current.receives:
            receives.append((endpoint.peer, endpoint.buffer(into)))
        sends: list[Message] = []
        for endpoint in current.sends:
            if endpoint.direct is None:
                for view, staged in endpoint.staged(out):
                    staged.copy_(view)
            sends.append((endpoint.peer, endpoint.buffer(out)))
        waits, wait_sent = self.transport.post(receives, sends)
        sent.append(wait_sent)
        return waits

    def _copy_locals(self) -> tuple[int, int]:
        copied = shared = 0
        for into, out in self._locals:
            if same_memory(into, out):
                shared += into.nbytes
            else:
                into.copy_(out)
                copied += into.nbytes
        return copied, shared

    def _bind(self, source: LocalMemory, destination: LocalMemory) -> None:
        """Finds the memory of every box that this rank sends, receives or copies."""
        plan, rank = self.plan, self.transport.rank
        transfers = np.nonzero((plan.sender == rank) | (plan.receiver == rank))[0]
        messages: dict[tuple[int, int, bool, int], list[tuple[int, torch.Tensor, torch.dtype]]] = {}
        for row in transfers.tolist():
            spec = plan.target.parameters[int(plan.parameter[row])]
            dims, dtype = len(spec.shape), DTYPES[spec.dtype]
            start = tuple(plan.start[row, :dims].tolist())
            shape = tuple(plan.shape[row, :dims].tolist())
            sender = int(plan.sender[row])
            receiver = int(plan.receiver[row])
            round_ = int(plan.round[row])
            if round_ == LOCAL:
                self._locals.append(
                    (
                        destination.view(spec.name, start, shape),
                        source.view(spec.name, start, shape),
                    )
                )
                continue
            outgoing = sender == rank
            view = (source if outgoing else destination).view(spec.name, start, shape)
            num_bytes = prod(shape) * dtype.itemsize
            alone = row if num_bytes >= ALONE_BYTES else -1
            messages.setdefault(
                (round_, receiver if outgoing else sender, outgoing, alone), []
            ).append((num_bytes, view, dtype))
        num_rounds = max((round_ for round_, *_ in messages), default=LOCAL) + 1
        self._rounds = [_Round() for _ in range(num_rounds)]
        for (round_, peer, outgoing, _), boxes in sorted(
            messages.items(), key=lambda item: item[0]
        ):
            # Data types with large items first: every box is then aligned to its own data type.
            boxes.sort(key=lambda box: -box[2].itemsize)
            sizes, views, dtypes = zip(*boxes, strict=True)
            self._rounds[round_].add(
                _Endpoint(peer, list(views), list(dtypes), sum(sizes)), outgoing
            )


def execute(
    plan: ReshardingPlan,
    sources: Sequence[LocalParameter],
    destinations: Sequence[LocalParameter],
    group: dist.ProcessGroup | None = None,
) -> ExecutionReport:
    """Runs `plan` once. Collective over `group`, whose ranks are the plan's."""
    return Executor(plan, sources, destinations, group).run()


def _device_of(parameters: Sequence[LocalParameter]) -> torch.device:
    for parameter in parameters:
        for shard in parameter.shards:
            return shard.tensor.device
    return torch.device("cpu")


def _make_slots(sizes: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Two staging buffers: one for rounds with even numbers, one for the others."""
    slots = []
    for slot in (0, 1):
        num_bytes = max(sizes[slot::2], default=0)
        slots.append(torch.empty(num_bytes, dtype=torch.uint8, device=device))
    return slots
