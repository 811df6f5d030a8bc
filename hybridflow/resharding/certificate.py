"""verify(plan) -> Certificate: proves a plan correct from the two shard maps and the list of
transfers alone.

It shares no code with the compiler. It proves, each with its number in the certificate, that every
element is written exactly once, from a rank that holds it; that every rank receives exactly the
bytes that it needs and does not hold; that senders of replicated data are balanced; and that extra
memory stays within two buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridflow.resharding.boxes import Ints, contains, overlapping, volumes
from hybridflow.resharding.plan import ReshardingPlan
from hybridflow.resharding.shard_map import ShardMap

EXTRA_MEMORY_BUCKETS = 2
"""Extra memory of a rank is at most this many buckets."""


class PlanError(RuntimeError):
    """A plan that is not correct; the text names the parameter and the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The facts that verify has proved about a plan; bytes are counted in the target's data
    type."""

    num_ranks: int
    num_parameters: int
    num_transfers: int
    """Transfers between different ranks."""
    num_rounds: int
    model_bytes: int
    received_max: int
    received_total: int
    bound_max: int
    """The lower bound of a rank is the bytes that it needs and does not hold; this is the
    largest."""
    bound_total: int
    sent_max: int
    sender_imbalance: int
    """Most bytes that a sender sends more than another rank that could send one of its
    transfers (a rank on the receiver's machine, if one of them holds the data); at most one
    bucket."""
    extra_peak_bytes: int
    """Most staging memory of a rank, counted as if every transfer were staged."""
    bucket_bytes: int
    between_machines_bytes: int
    busiest_link: tuple[int, int, int]
    """(sender, receiver, bytes) of the pair with most traffic: of machines, or of ranks on one
    machine."""

    def __str__(self) -> str:
        first, second, link = self.busiest_link
        allowed = f"{EXTRA_MEMORY_BUCKETS} buckets of {_mb(self.bucket_bytes)} allowed"
        return "\n".join(
            [
                f"certificate: {self.num_parameters} parameters, {_mb(self.model_bytes)}, "
                f"{self.num_ranks} ranks",
                "  every destination element is written exactly once, from a rank that holds it",
                f"  received per rank   {_mb(self.received_max)} at most, "
                f"{_mb(self.received_total)} in total",
                "  bytes received by every rank = the lower bound: what it needs and does not hold",
                f"  sent per rank       {_mb(self.sent_max)} at most; no better balance within "
                f"{_mb(self.sender_imbalance)}",
                f"  extra memory        {_mb(self.extra_peak_bytes)} at most ({allowed})",
                f"  between machines    {_mb(self.between_machines_bytes)}; busiest link {first} "
                f"-> {second}: {_mb(link)}",
                f"  {self.num_transfers} transfers in {self.num_rounds} rounds",
            ]
        )


def verify(plan: ReshardingPlan) -> Certificate:
    """Proves the plan correct, or raises a PlanError that says what is wrong."""
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
            f"a rank needs {extra} bytes of extra memory, more than {EXTRA_MEMORY_BUCKETS} "
            f"buckets of {plan.bucket_bytes}"
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
    """Bytes that every rank needs (target) and does not hold (source), in the target's data type:
    int64 [ranks].

    Both maps have the same parameters in the same order. The boxes of a rank are disjoint, so the
    part of a needed box that the rank holds is the sum of the intersections.
    """
    num_ranks = target.num_ranks
    itemsize = target.itemsize
    need = target.bytes_per_rank
    have_key = source.parameter * num_ranks + source.rank
    need_key = target.parameter * num_ranks + target.rank
    first = np.searchsorted(have_key, need_key, side="left")
    count = np.searchsorted(have_key, need_key, side="right") - first
    need_row = np.repeat(np.arange(len(need_key)), count)
    have_row = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(need_row))
    low = np.maximum(source.start[have_row], target.start[need_row])
    high = np.minimum(
        source.start[have_row] + source.shape[have_row],
        target.start[need_row] + target.shape[need_row],
    )
    bytes_held = volumes(np.maximum(high - low, 0)) * itemsize[target.parameter[need_row]]
    np.subtract.at(need, target.rank[need_row], bytes_held)
    return need


def _check_senders(plan: ReshardingPlan) -> None:
    """Checks that every transfer lies in a box that its sender holds."""
    _rows_of(plan, plan.source, plan.sender, "sends", "does not hold")


def _rows_of(
    plan: ReshardingPlan, shard_map: ShardMap, rank: Ints, verb: str, problem: str
) -> Ints:
    """The row of `shard_map`, for the transfer's parameter and `rank`, that contains each
    transfer: int64 [transfers]."""
    key = shard_map.parameter * plan.num_ranks + shard_map.rank
    transfer_key = plan.parameter * plan.num_ranks + rank
    first = np.searchsorted(key, transfer_key, side="left")
    count = np.searchsorted(key, transfer_key, side="right") - first
    transfer = np.repeat(np.arange(len(transfer_key)), count)
    row = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(transfer))
    inside = (shard_map.start[row] <= plan.start[transfer]).all(axis=1) & (
        plan.start[transfer] + plan.shape[transfer] <= shard_map.start[row] + shard_map.shape[row]
    ).all(axis=1)
    result = np.full(len(transfer_key), -1, dtype=np.int64)
    result[transfer[inside]] = row[inside]
    if (result < 0).any():
        bad = int(np.nonzero(result < 0)[0][0])
        name = plan.target.parameters[int(plan.parameter[bad])].name
        raise PlanError(
            f"{name}: rank {rank[bad]} {verb} start {plan.start[bad]} shape {plan.shape[bad]}, "
            f"which it {problem}"
        )
    return result


def _check_cover(plan: ReshardingPlan) -> None:
    """Checks that the transfers into every target box are disjoint and fill it."""
    row = _rows_of(plan, plan.target, plan.receiver, "receives", "does not want")
    filled = np.zeros(len(plan.target.parameter), dtype=np.int64)
    np.add.at(filled, row, volumes(plan.shape))
    wrong = np.nonzero(filled != volumes(plan.target.shape))[0]
    if len(wrong):
        bad = int(wrong[0])
        name = plan.target.parameters[int(plan.target.parameter[bad])].name
        raise PlanError(
            f"{name}: rank {plan.target.rank[bad]} gets {filled[bad]} of "
            f"{volumes(plan.target.shape)[bad]} elements"
        )
    order = np.argsort(row, kind="stable")
    _, first, count = np.unique(row[order], return_index=True, return_counts=True)
    checked: set[bytes] = set()
    for begin, number in zip(first[count > 1].tolist(), count[count > 1].tolist(), strict=True):
        transfers = order[begin : begin + number]
        content = plan.start[transfers].tobytes() + plan.shape[transfers].tobytes()
        if content in checked:
            continue
        checked.add(content)
        if overlapping(plan.start[transfers], plan.shape[transfers]):
            first_transfer = transfers[0]
            name = plan.target.parameters[int(plan.parameter[first_transfer])].name
            raise PlanError(
                f"{name}: an element is written twice on rank {plan.receiver[first_transfer]}"
            )


def _sender_imbalance(plan: ReshardingPlan) -> int:
    """Most bytes that a sender sends more than another rank that could send one of its
    transfers."""
    load, nodes, source = plan.bytes_sent, np.array(plan.nodes), plan.source
    order = np.argsort(plan.parameter, kind="stable")
    order = order[plan.remote[order]]
    bounds = np.searchsorted(plan.parameter[order], np.arange(len(plan.target.parameters) + 1))
    worst = 0
    for number in range(len(plan.target.parameters)):
        transfers, rows = order[bounds[number] : bounds[number + 1]], source.rows(number)
        for begin in range(0, len(transfers), 4096):
            part = transfers[begin : begin + 4096]
            can_send = contains(
                source.start[rows], source.shape[rows], plan.start[part], plan.shape[part]
            )
            near = can_send & (
                nodes[source.rank[rows]][:, None] == nodes[plan.receiver[part]][None]
            )
            can_send = np.where(near.any(axis=0)[None], near, can_send)
            lightest = np.where(
                can_send, load[source.rank[rows]][:, None], np.iinfo(np.int64).max
            ).min(axis=0)
            worst = max(worst, int((load[plan.sender[part]] - lightest).max(initial=0)))
    return worst


def _extra_peak(plan: ReshardingPlan) -> int:
    """Most bytes that a rank stages in two consecutive rounds, sent and received, with the
    padding of its messages."""
    if not plan.num_rounds:
        return 0
    staged = np.zeros((plan.num_rounds, plan.num_ranks), dtype=np.int64)
    remote = plan.remote
    np.add.at(staged, (plan.round[remote], plan.sender[remote]), plan.num_bytes[remote])
    np.add.at(staged, (plan.round[remote], plan.receiver[remote]), plan.num_bytes[remote])
    peak = staged[0::2].max(axis=0)
    if len(staged) > 1:
        peak = peak + staged[1::2].max(axis=0)
    return int(peak.max())


def _links(plan: ReshardingPlan) -> tuple[int, tuple[int, int, int]]:
    """(bytes between machines, the busiest pair of machines, or of ranks on a single machine)."""
    remote, nodes = plan.remote, np.array(plan.nodes)
    crosses = nodes[plan.sender] != nodes[plan.receiver]
    single_machine = len(set(plan.nodes)) == 1
    chosen = remote if single_machine else remote & crosses
    ends = np.stack([plan.sender, plan.receiver], axis=1)[chosen]
    if not single_machine:
        ends = nodes[ends]
    pairs, index = np.unique(ends, axis=0, return_inverse=True)
    if not len(pairs):
        return 0, (0, 0, 0)
    total = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(total, index.reshape(-1), plan.num_bytes[chosen])
    best = int(total.argmax())
    busiest = (int(pairs[best, 0]), int(pairs[best, 1]), int(total[best]))
    return int(plan.num_bytes[remote & crosses].sum()), busiest


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
