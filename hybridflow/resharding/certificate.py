"""verify(plan) -> Certificate: proves from the two shard maps and the list of transfers alone that a plan is
right.

Shares no code with the compiler. What it proves, each with its number in the certificate: every destination
element is written exactly once; from a rank that holds it; every rank receives exactly the bytes that it
needs and does not hold; senders of replicated data are balanced; extra memory stays within two buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridflow.resharding.boxes import Ints, contains, overlapping, volumes
from hybridflow.resharding.plan import Plan
from hybridflow.resharding.shard_map import ShardMap

EXTRA_MEMORY_BUCKETS = 2
"""Extra memory of a rank is at most this many buckets."""


class PlanError(RuntimeError):
    """A plan that is not what it should be; the text names the parameter and the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What verify has proved about a plan; bytes are the target's data type."""

    num_ranks: int
    num_parameters: int
    num_transfers: int
    """Between different ranks."""
    num_rounds: int
    model_bytes: int
    received_max: int
    received_total: int
    bound_max: int
    """Largest over the ranks of: bytes that it needs and does not hold."""
    bound_total: int
    sent_max: int
    sender_imbalance: int
    """Most bytes that a sender has to send beyond another rank that could send one of its transfers (a rank
    on the receiver's machine, if one of them holds it); at most one bucket."""
    extra_peak_bytes: int
    """Most staging memory of a rank if nothing could be sent from or received into its place."""
    bucket_bytes: int
    between_machines_bytes: int
    busiest_link: tuple[int, int, int]
    """(sender, receiver, bytes) of the pair of machines with most traffic, or of ranks where there is one
    machine."""

    def __str__(self) -> str:
        first, second, link = self.busiest_link
        allowed = f"{EXTRA_MEMORY_BUCKETS} buckets of {_mb(self.bucket_bytes)} allowed"
        return "\n".join(
            [
                f"certificate: {self.num_parameters} parameters, {_mb(self.model_bytes)}, {self.num_ranks} "
                "ranks",
                "  every destination element is written exactly once, from a rank that holds it",
                f"  received per rank   {_mb(self.received_max)} at most, {_mb(self.received_total)} in "
                "total",
                "  bytes received by every rank = the lower bound: what it needs and does not hold",
                f"  sent per rank       {_mb(self.sent_max)} at most; no better balance within "
                f"{_mb(self.sender_imbalance)}",
                f"  extra memory        {_mb(self.extra_peak_bytes)} at most ({allowed})",
                f"  between machines    {_mb(self.between_machines_bytes)}; busiest link {first} -> "
                f"{second}: {_mb(link)}",
                f"  {self.num_transfers} transfers in {self.num_rounds} rounds",
            ]
        )


def verify(plan: Plan) -> Certificate:
    """Prove the plan right, or raise a PlanError that says what is wrong."""
    _check_senders(plan)
    _check_cover(plan)
    bound, received = lower_bound(plan.source, plan.target), plan.bytes_received
    if (received != bound).any():
        rank = int(np.nonzero(received != bound)[0][0])
        raise PlanError(
            f"rank {rank} receives {received[rank]} bytes; it needs and does not hold {bound[rank]}"
        )
    imbalance, extra = _sender_imbalance(plan), _extra_peak(plan)
    if imbalance > plan.bucket_bytes:
        raise PlanError(
            f"senders of replicated data differ by {imbalance} bytes, more than one bucket of "
            f"{plan.bucket_bytes}"
        )
    if extra > EXTRA_MEMORY_BUCKETS * plan.bucket_bytes:
        raise PlanError(
            f"a rank needs {extra} bytes of extra memory, more than {EXTRA_MEMORY_BUCKETS} buckets of "
            f"{plan.bucket_bytes}"
        )
    between, link = _links(plan)
    return Certificate(
        num_ranks=plan.num_ranks,
        num_parameters=len(plan.target.parameters),
        num_transfers=int(plan.remote.sum()),
        num_rounds=plan.num_rounds,
        model_bytes=plan.target.num_bytes,
        received_max=int(received.max(initial=0)),
        received_total=int(received.sum()),
        bound_max=int(bound.max(initial=0)),
        bound_total=int(bound.sum()),
        sent_max=int(plan.bytes_sent.max(initial=0)),
        sender_imbalance=imbalance,
        extra_peak_bytes=extra,
        bucket_bytes=plan.bucket_bytes,
        between_machines_bytes=between,
        busiest_link=link,
    )


def lower_bound(source: ShardMap, target: ShardMap) -> Ints:
    """Bytes that every rank needs (target) and does not hold (source), in the target's data type: int64
    [ranks].

    Both maps have the same parameters in the same order. Boxes of one rank are disjoint, so what it holds of
    a needed box is the sum of the intersections.
    """
    num_ranks = target.num_ranks
    itemsize = np.array([spec.itemsize for spec in target.parameters], dtype=np.int64)
    need = target.bytes_per_rank
    have_key, need_key = (
        source.parameter * num_ranks + source.rank,
        target.parameter * num_ranks + target.rank,
    )
    first = np.searchsorted(have_key, need_key, side="left")
    count = np.searchsorted(have_key, need_key, side="right") - first
    need_row = np.repeat(np.arange(len(need_key)), count)
    have_row = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(need_row))
    low = np.maximum(source.start[have_row], target.start[need_row])
    high = np.minimum(
        source.start[have_row] + source.shape[have_row], target.start[need_row] + target.shape[need_row]
    )
    held = volumes(np.maximum(high - low, 0)) * itemsize[target.parameter[need_row]]
    np.subtract.at(need, target.rank[need_row], held)
    return need


def _check_senders(plan: Plan) -> None:
    """Every transfer lies in one box that its sender holds."""
    _rows_of(plan, plan.source, plan.sender, "sends", "does not hold")


def _rows_of(plan: Plan, shard_map: ShardMap, rank: Ints, verb: str, problem: str) -> Ints:
    """For every transfer the row of `shard_map` (of the transfer's parameter and `rank`) that contains it:
    int64 [transfers]."""
    key = shard_map.parameter * plan.num_ranks + shard_map.rank
    wanted = plan.parameter * plan.num_ranks + rank
    first = np.searchsorted(key, wanted, side="left")
    count = np.searchsorted(key, wanted, side="right") - first
    transfer = np.repeat(np.arange(len(wanted)), count)
    row = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(transfer))
    inside = (shard_map.start[row] <= plan.start[transfer]).all(axis=1) & (
        plan.start[transfer] + plan.shape[transfer] <= shard_map.start[row] + shard_map.shape[row]
    ).all(axis=1)
    result = np.full(len(wanted), -1, dtype=np.int64)
    result[transfer[inside]] = row[inside]
    if (result < 0).any():
        bad = int(np.nonzero(result < 0)[0][0])
        name = plan.target.parameters[int(plan.parameter[bad])].name
        raise PlanError(
            f"{name}: rank {rank[bad]} {verb} start {plan.start[bad]} shape {plan.shape[bad]}, which it "
            f"{problem}"
        )
    return result


def _check_cover(plan: Plan) -> None:
    """The transfers into every target box are disjoint and fill it."""
    row = _rows_of(plan, plan.target, plan.receiver, "receives", "does not want")
    filled = np.zeros(len(plan.target.parameter), dtype=np.int64)
    np.add.at(filled, row, volumes(plan.shape))
    wrong = np.nonzero(filled != volumes(plan.target.shape))[0]
    if len(wrong):
        bad = int(wrong[0])
        name = plan.target.parameters[int(plan.target.parameter[bad])].name
        raise PlanError(
            f"{name}: rank {plan.target.rank[bad]} gets {filled[bad]} of {volumes(plan.target.shape)[bad]} "
            "elements"
        )
    order = np.argsort(row, kind="stable")
    _, first, count = np.unique(row[order], return_index=True, return_counts=True)
    checked: set[bytes] = set()
    for begin, number in zip(first[count > 1].tolist(), count[count > 1].tolist(), strict=True):
        mine = order[begin : begin + number]
        content = plan.start[mine].tobytes() + plan.shape[mine].tobytes()
        if content in checked:
            continue
        checked.add(content)
        if overlapping(plan.start[mine], plan.shape[mine]):
            name = plan.target.parameters[int(plan.parameter[mine[0]])].name
            raise PlanError(f"{name}: an element is written twice on rank {plan.receiver[mine[0]]}")


def _sender_imbalance(plan: Plan) -> int:
    """The most that a sender has to send beyond another rank that could send one of its transfers."""
    load, nodes, source = plan.bytes_sent, np.array(plan.nodes), plan.source
    order = np.argsort(plan.parameter, kind="stable")
    order = order[plan.remote[order]]
    bounds = np.searchsorted(plan.parameter[order], np.arange(len(plan.target.parameters) + 1))
    worst = 0
    for number in range(len(plan.target.parameters)):
        mine, rows = order[bounds[number] : bounds[number + 1]], source.rows(number)
        for begin in range(0, len(mine), 4096):
            part = mine[begin : begin + 4096]
            could = contains(source.start[rows], source.shape[rows], plan.start[part], plan.shape[part])
            near = could & (nodes[source.rank[rows]][:, None] == nodes[plan.receiver[part]][None])
            could = np.where(near.any(axis=0)[None], near, could)
            lightest = np.where(could, load[source.rank[rows]][:, None], np.iinfo(np.int64).max).min(axis=0)
            worst = max(worst, int((load[plan.sender[part]] - lightest).max(initial=0)))
    return worst


def _extra_peak(plan: Plan) -> int:
    """Most bytes that a rank stages in two consecutive rounds, sent and received, with the padding of its
    messages."""
    if not plan.num_rounds:
        return 0
    staged = np.zeros((plan.num_rounds, plan.num_ranks), dtype=np.int64)
    remote = plan.remote
    np.add.at(staged, (plan.round[remote], plan.sender[remote]), plan.num_bytes[remote])
    np.add.at(staged, (plan.round[remote], plan.receiver[remote]), plan.num_bytes[remote])
    slots = [staged[slot::2].max(axis=0) for slot in (0, 1) if slot < len(staged)]
    return int(np.sum(slots, axis=0).max()) if len(slots) > 1 else int(slots[0].max())


def _links(plan: Plan) -> tuple[int, tuple[int, int, int]]:
    """(bytes between machines, the busiest pair of machines, or of ranks on a single machine)."""
    remote, nodes = plan.remote, np.array(plan.nodes)
    crosses = nodes[plan.sender] != nodes[plan.receiver]
    one = len(set(plan.nodes)) == 1
    chosen = remote if one else remote & crosses
    ends = np.stack([plan.sender, plan.receiver], axis=1)[chosen]
    ends = ends if one else nodes[ends]
    pairs, index = np.unique(ends, axis=0, return_inverse=True)
    if not len(pairs):
        return 0, (0, 0, 0)
    total = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(total, index.reshape(-1), plan.num_bytes[chosen])
    best = int(total.argmax())
    return int(plan.num_bytes[remote & crosses].sum()), (
        int(pairs[best, 0]),
        int(pairs[best, 1]),
        int(total[best]),
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
