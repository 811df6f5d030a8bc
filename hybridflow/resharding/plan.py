"""compile(source, target) -> ReshardingPlan: who sends which box of which parameter to whom, in
which round.

The plan is plain data. It moves every element that a rank needs and does not hold exactly once,
from one of the ranks that hold it. Tensors and process groups are left to execute.py, proofs to
certificate.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybridflow.resharding.boxes import Ints, volumes, with_dims
from hybridflow.resharding.requests import make_requests
from hybridflow.resharding.rounds import assign_rounds, choose_senders
from hybridflow.resharding.shard_map import ShardMap

LOCAL = -1
"""Round of a transfer from a rank to itself: a copy in memory."""
COMPILER_VERSION = 1
"""Part of the key of the plan cache: raise it when compile's output changes."""
DEFAULT_BUCKET_BYTES = 64 << 20
MESSAGE_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class ReshardingPlan:
    """Transfers in order of execution: compile returns it, verify checks it, execute runs it.

    Extra memory: each rank stages at most `staging_bytes` of outgoing and as much of incoming data
    per round, and two rounds are under way at once (one is packed while the other travels): 4 *
    staging_bytes <= 2 * bucket_bytes.
    """

    source: ShardMap
    target: ShardMap
    bucket_bytes: int
    nodes: tuple[int, ...]
    """[ranks], number of each rank's machine."""
    sender: Ints
    """[transfers]"""
    receiver: Ints
    """[transfers], equal to the sender for a local copy."""
    parameter: Ints
    """[transfers], index into target.parameters."""
    start: Ints
    """[transfers, dims]"""
    shape: Ints
    """[transfers, dims]"""
    round: Ints
    """[transfers], LOCAL or the round in which the transfer is sent."""

    @property
    def num_ranks(self) -> int:
        return self.target.num_ranks

    @property
    def num_rounds(self) -> int:
        return int(self.round.max(initial=LOCAL)) + 1

    @property
    def num_bytes(self) -> Ints:
        """[transfers], bytes in the target's data type."""
        return volumes(self.shape) * self.target.itemsize[self.parameter]

    @property
    def remote(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """bool [transfers], whether sender and receiver are different ranks."""
        return np.asarray(self.round != LOCAL)

    @property
    def bytes_received(self) -> Ints:
        """[ranks]"""
        return self._per_rank(self.receiver)

    @property
    def bytes_sent(self) -> Ints:
        """[ranks]"""
        return self._per_rank(self.sender)

    def _per_rank(self, rank: Ints) -> Ints:
        result = np.zeros(self.num_ranks, dtype=np.int64)
        np.add.at(result, rank[self.remote], self.num_bytes[self.remote])
        return result

    @property
    def staging_bytes(self) -> int:
        """Most bytes that a rank stages in one direction in one round."""
        return staging_bytes(self.bucket_bytes, self.num_ranks)


def staging_bytes(bucket_bytes: int, num_ranks: int) -> int:
    """Most bytes that a rank stages in one direction in one round: half a bucket, less the
    padding of one message per peer."""
    return bucket_bytes // 2 - MESSAGE_ALIGNMENT * num_ranks


def compile(
    source: ShardMap,
    target: ShardMap,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    nodes: Sequence[int] | None = None,
    unused: Sequence[str] = (),
) -> ReshardingPlan:
    """The plan from `source` to `target`, two maps over the same ranks.

    ShardMap.relabel brings the maps of two pools into one rank space. `nodes` numbers the machine
    of every rank (None: one machine); a sender on the receiver's machine is preferred. Bytes are
    moved in the target's data type. `unused` names source parameters that the target does not want.
    Raises a ValueError where a parameter is missing on one side, has different shapes, or where no
    rank holds a needed element.
    """
    nodes = tuple(nodes) if nodes is not None else (0,) * target.num_ranks
    source = aligned(source, target, nodes, unused)
    limit = staging_bytes(bucket_bytes, target.num_ranks)
    itemsize = target.itemsize
    largest = int(itemsize.max(initial=1))
    if limit < largest:
        least = 2 * (largest + MESSAGE_ALIGNMENT * target.num_ranks)
        raise ValueError(
            f"bucket_bytes={bucket_bytes} is too small for {target.num_ranks} ranks; give at "
            f"least {least}"
        )
    target.check_disjoint()
    requests = make_requests(source, target, np.array(nodes), limit)
    num_bytes = volumes(requests.shape) * itemsize[requests.parameter]
    sender = choose_senders(requests, num_bytes, target.num_ranks)
    remote = sender != requests.receiver
    round_ = np.full(len(sender), LOCAL, dtype=np.int64)
    round_[remote] = assign_rounds(
        sender[remote], requests.receiver[remote], num_bytes[remote], target.num_ranks, limit
    )
    order = np.lexsort((requests.parameter, requests.receiver, sender, round_))
    return ReshardingPlan(
        source=source,
        target=target,
        bucket_bytes=bucket_bytes,
        nodes=nodes,
        sender=sender[order],
        receiver=requests.receiver[order],
        parameter=requests.parameter[order],
        start=requests.start[order],
        shape=requests.shape[order],
        round=round_[order],
    )


def plan_key(
    source: ShardMap,
    target: ShardMap,
    bucket_bytes: int,
    nodes: Sequence[int] | None,
    unused: Sequence[str] = (),
) -> str:
    """Hexadecimal hash of everything that the plan depends on."""
    nodes = tuple(nodes) if nodes is not None else (0,) * target.num_ranks
    text = (
        f"{COMPILER_VERSION} {source.digest()} {target.digest()} {bucket_bytes} {nodes} "
        f"{sorted(unused)}"
    )
    return hashlib.sha256(text.encode()).hexdigest()


def aligned(
    source: ShardMap, target: ShardMap, nodes: tuple[int, ...], unused: Sequence[str]
) -> ShardMap:
    """`source` with the target's parameters in the target's order.

    Raises a ValueError where the two maps do not fit together; see compile.
    """
    if source.num_ranks != target.num_ranks or len(nodes) != target.num_ranks:
        raise ValueError(
            f"compile: source has {source.num_ranks} ranks, target {target.num_ranks}, nodes "
            f"{len(nodes)}; relabel them into one rank space"
        )
    number = source.numbers
    needed = {*target.names, *unused}
    unwanted = [name for name in number if name not in needed]
    if unwanted:
        raise ValueError(
            f"compile: no target rank wants {', '.join(unwanted[:5])}; name them in `unused` if "
            "that is meant"
        )
    new_index = np.full(len(source.parameters), -1, dtype=np.int64)
    for i, spec in enumerate(target.parameters):
        if spec.name not in number:
            raise ValueError(f"compile: the target wants {spec.name}, which no source rank holds")
        have = source.parameters[number[spec.name]]
        if have.shape != spec.shape:
            raise ValueError(
                f"compile: {spec.name} has shape {have.shape} in the source and {spec.shape} in "
                "the target"
            )
        new_index[number[spec.name]] = i
    rows = new_index[source.parameter] >= 0
    dims = target.dims
    table = np.concatenate(
        [
            new_index[source.parameter[rows], None],
            source.rank[rows, None],
            with_dims(source.start[rows], dims, 0),
            with_dims(source.shape[rows], dims, 1),
        ],
        axis=1,
    )
    parameters = tuple(source.parameters[number[spec.name]] for spec in target.parameters)
    return ShardMap._sorted(parameters, source.num_ranks, table, dims)
