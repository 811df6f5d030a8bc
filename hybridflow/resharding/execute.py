"""Running a plan: pack, send, receive, unpack, in rounds; the packing of one round overlaps the transfer of
the round before.

A piece that lies contiguously in memory on a side travels from or into that memory itself; only the others
are staged. The cast to the target's data type happens on the sender.
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
from hybridflow.resharding.plan import LOCAL, MESSAGE_ALIGNMENT, Plan
from hybridflow.resharding.shard_map import DTYPES
from hybridflow.resharding.shards import LocalParameter
from hybridflow.resharding.transport import GroupTransport, Message, Transport

ALONE_BYTES = 128 << 10
"""Pieces of at least this size are messages of their own, so that they need no staging where they are
contiguous."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionReport:
    """What one execution did on this rank."""

    seconds: float
    received_bytes: int
    copied_bytes: int
    """Moved inside the rank's memory."""
    shared_bytes: int
    """Not moved: source and destination are the same memory."""
    staging_bytes: int
    """Extra memory allocated."""


@dataclass(slots=True)
class _Side:
    """One direction of one message: the pieces, and where in the staging buffer it lies (direct: the memory
    itself)."""

    peer: int
    views: list[torch.Tensor]
    dtypes: list[torch.dtype]
    num_bytes: int
    offset: int = 0
    direct: torch.Tensor | None = None


@dataclass(slots=True)
class _Round:
    sends: list[_Side] = field(default_factory=list)
    receives: list[_Side] = field(default_factory=list)
    staged_send: int = 0
    staged_receive: int = 0

    def place(self, side: _Side, outgoing: bool) -> None:
        """Add a message; it is direct where it is one contiguous piece of the right data type."""
        only = side.views[0] if len(side.views) == 1 else None
        if only is not None and only.is_contiguous() and only.dtype == side.dtypes[0]:
            side.direct = as_bytes(only)
        padded = -(-side.num_bytes // MESSAGE_ALIGNMENT) * MESSAGE_ALIGNMENT if side.direct is None else 0
        if outgoing:
            side.offset, self.staged_send = self.staged_send, self.staged_send + padded
            self.sends.append(side)
        else:
            side.offset, self.staged_receive = self.staged_receive, self.staged_receive + padded
            self.receives.append(side)


class Executor:
    """A plan bound to this rank's memory; build it once where the memory stays, run it at every sync.

    executor = Executor(plan, engine.local_parameters(), generator.destinations())
    executor.run()      # collective over the group
    """

    def __init__(
        self,
        plan: Plan,
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
        device = next(
            (s.tensor.device for p in (*destinations, *sources) for s in p.shards), torch.device("cpu")
        )
        # Two slots per direction: one round is packed (or unpacked) while the other travels.
        sizes = [max((r.staged_send for r in self._rounds[slot::2]), default=0) for slot in (0, 1)]
        self._send_slots = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        sizes = [max((r.staged_receive for r in self._rounds[slot::2]), default=0) for slot in (0, 1)]
        self._receive_slots = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]

    @property
    def staging_bytes(self) -> int:
        """Extra memory held."""
        return sum(slot.numel() for slot in (*self._send_slots, *self._receive_slots))

    def run(self) -> ExecutionReport:
        """Move everything; returns when this rank's destinations are complete and its sources may change."""
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
            for side, wait in zip(current.receives, pending, strict=True):
                wait()
                received += side.num_bytes
                if side.direct is None:
                    _unpack(side, slot)
            pending = following
        if sent:
            sent[-1]()
        return copied, shared, received

    def _post(self, number: int, sent: list[Callable[[], None]]) -> list[Callable[[], None]]:
        current = self._rounds[number]
        into, out = self._receive_slots[number % 2], self._send_slots[number % 2]
        receives: list[Message] = [
            (s.peer, s.direct if s.direct is not None else into[s.offset : s.offset + s.num_bytes])
            for s in current.receives
        ]
        sends: list[Message] = []
        for side in current.sends:
            if side.direct is None:
                _pack(side, out)
            sends.append(
                (
                    side.peer,
                    side.direct
                    if side.direct is not None
                    else out[side.offset : side.offset + side.num_bytes],
                )
            )
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
        plan, rank = self.plan, self.transport.rank
        mine = np.nonzero((plan.sender == rank) | (plan.receiver == rank))[0]
        messages: dict[tuple[int, int, bool, int], list[tuple[int, torch.Tensor, torch.dtype]]] = {}
        for row in mine.tolist():
            spec = plan.target.parameters[int(plan.parameter[row])]
            dims, dtype = len(spec.shape), DTYPES[spec.dtype]
            start, shape = tuple(plan.start[row, :dims].tolist()), tuple(plan.shape[row, :dims].tolist())
            sender, receiver, round_ = int(plan.sender[row]), int(plan.receiver[row]), int(plan.round[row])
            if round_ == LOCAL:
                self._locals.append(
                    (destination.view(spec.name, start, shape), source.view(spec.name, start, shape))
                )
                continue
            outgoing = sender == rank
            view = (source if outgoing else destination).view(spec.name, start, shape)
            num_bytes = prod(shape) * dtype.itemsize
            alone = row if num_bytes >= ALONE_BYTES else -1
            messages.setdefault((round_, receiver if outgoing else sender, outgoing, alone), []).append(
                (num_bytes, view, dtype)
            )
        self._rounds = [_Round() for _ in range(max((key[0] for key in messages), default=-1) + 1)]
        for (round_, peer, outgoing, _), pieces in sorted(messages.items(), key=lambda item: item[0]):
            # Large items first: every piece is then aligned to its own data type.
            pieces.sort(key=lambda piece: -piece[2].itemsize)
            side = _Side(
                peer,
                [view for _, view, _ in pieces],
                [dtype for _, _, dtype in pieces],
                sum(size for size, _, _ in pieces),
            )
            self._rounds[round_].place(side, outgoing)


def execute(
    plan: Plan,
    sources: Sequence[LocalParameter],
    destinations: Sequence[LocalParameter],
    group: dist.ProcessGroup | None = None,
) -> ExecutionReport:
    """Run `plan` once. Collective over `group`, whose ranks are the plan's."""
    return Executor(plan, sources, destinations, group).run()


def _pack(side: _Side, slot: torch.Tensor) -> None:
    for view, piece in _pieces(side, slot):
        piece.copy_(view)


def _unpack(side: _Side, slot: torch.Tensor) -> None:
    for view, piece in _pieces(side, slot):
        view.copy_(piece)


def _pieces(side: _Side, slot: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(memory of the piece, its place in the staging buffer) of every piece of a staged message."""
    offset = side.offset
    for view, dtype in zip(side.views, side.dtypes, strict=True):
        end = offset + view.numel() * dtype.itemsize
        yield view, slot[offset:end].view(dtype).view(view.shape)
        offset = end
