"""Blame: which rank is the cause when calls fail or stand still, and the report of who waits for
whom. Reads the answers that Ray has; ends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from hybridflow.calls import Pending
from hybridflow.errors import WorkerDied, WorkerError

GRACE_S = 5.0
"""How long the other ranks of a failed call may take to finish before the pool is taken for stuck
and killed."""
BOILERPLATE = ("class_name", "namespace", "actor_id", "The actor died because")
"""Beginnings of the lines of Ray's messages that say nothing of the cause."""


def one_per_pool(calls: Sequence[Pending]) -> list[Pending]:
    """A call of each pool."""
    return list({call.pool: call for call in calls}.values())


def all_replies(calls: Sequence[Pending]) -> list[Any]:
    """The replies of all ranks of all calls."""
    return list(chain.from_iterable(call.replies for call in calls))


def unanswered(replies: Sequence[Any], timeout_s: float) -> list[Any]:
    """Those of these replies that are not there when all are, or after that many seconds."""
    import ray

    _, waiting = ray.wait(list(replies), num_returns=len(replies), timeout=timeout_s)
    return list(waiting)


def find_deaths(pending: Sequence[Pending]) -> list[tuple[Pending, int, str]]:
    """Every rank of a pending call whose process is gone, with a line about it."""
    import ray
    from ray.exceptions import RayActorError, RayError

    deaths = []
    for call in pending:
        for rank, reply in enumerate(call.replies):
            done, _ = ray.wait([reply], timeout=0)
            try:
                ray.get(done)
            except RayActorError as death:
                causes = [call.explain_death(rank), first_lines(death)]
                line = (
                    f"{call.role} rank {rank} died in {call.method} ({call.describe_host(rank)}): "
                    f"{'; '.join(filter(None, causes))}"
                )
                deaths.append((call, rank, line))
            except RayError:
                continue  # another rank's failure of another kind; deaths are what is looked for
    return deaths


def first_lines(error: Exception) -> str:
    """Ray's message without its blank and boilerplate lines."""
    lines = []
    for line in map(str.strip, str(error).splitlines()):
        if line and not line.startswith(BOILERPLATE):
            lines.append(line)
    return "; ".join(lines)[:1000]


def find_peers(error: WorkerError, pending: Sequence[Pending]) -> list[Pending]:
    """The calls that may wait for the rank that failed: of its pool, and of the same method in
    other pools. Pools that work together (on a transfer of weights, say) do so in methods of one
    name. A rank that could not read a column because the process that wrote it died is nobody's
    cause: then the death is looked for everywhere."""
    if error.cause.startswith(WorkerDied.__name__):
        return list(pending)
    peers = []
    for call in pending:
        if call.pool == error.where.pool or call.method == error.where.method:
            peers.append(call)
    return peers


def wait_for_peers(peers: Sequence[Pending]) -> list[Any]:
    """The replies that are not there after a grace period. Those peers wait for the failed rank,
    in a collective for ever, or it waited for them."""
    import ray

    replies = all_replies(peers)
    if not replies:
        return []
    return ray.wait(replies, num_returns=len(replies), timeout=GRACE_S)[1]


def silent_ranks(call: Pending) -> list[int]:
    import ray

    _, waiting = ray.wait(list(call.replies), num_returns=len(call.replies), timeout=0)
    return [rank for rank, reply in enumerate(call.replies) if reply in waiting]


def odd_first(stacks: dict[int, str]) -> list[int]:
    """The ranks, those first that did not write their stack, then those whose innermost frame the
    fewest ranks share: in a hang most ranks wait in a collective for the odd one."""
    innermost = {}
    for rank, stack in stacks.items():
        innermost[rank] = _innermost_frame(stack)
    counts: dict[str, int] = {}
    for frame in innermost.values():
        counts[frame] = counts.get(frame, 0) + 1

    def oddness(rank: int) -> tuple[bool, int, int]:
        frame = innermost[rank]
        return bool(frame), counts[frame], rank

    return sorted(stacks, key=oddness)


def _innermost_frame(stack: str) -> str:
    """The frame that the thread of the call is in; "" where the process wrote no stack."""
    for thread in re.split(r"\n(?=(?:Current t|T)hread )", stack):
        frames = [line.strip() for line in thread.splitlines() if line.startswith("  File ")]
        if frames and "host.py" in thread:
            return frames[0]
    return ""


def standstill_report(
    reason: str, pending: Sequence[Pending], stacks: dict[str, dict[int, str]]
) -> str:
    lines = [f"{reason}. Waiting for:"]
    for call in pending:
        lines.append(
            f"  {call.name} on pool {call.pool}: ranks {silent_ranks(call)} of "
            f"{len(call.replies)} have not answered"
        )
    for call in one_per_pool(pending):
        for rank in odd_first(stacks[call.pool]):
            lines += [
                f"--- pool {call.pool} rank {rank} ({call.describe_host(rank)})",
                stacks[call.pool][rank].rstrip(),
            ]
    return "\n".join(lines)
