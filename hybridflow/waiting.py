"""Waiting: every wait of the controller watches all pending calls.

A failed call raises as soon as it is known, even if its result is not the one being read; a dead
process is named; and when no call finishes for as long as a pool allows (PoolSpec.call_timeout_s),
the wait ends in a report of who waits for whom with the stack of every rank. Never in silence. In a
host process nothing is pending, so a wait there is a plain wait; its controller watches it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn

from hybridflow.errors import WorkerDied, WorkerError, WorkerStuck

POLL_S = 1.0
"""How often a wait looks at the other pending calls."""
GRACE_S = 5.0
"""How long the other ranks of a failed call may take to finish before the pool is taken for stuck
and killed.
"""
DEFAULT_TIMEOUT_S = 1800.0
BOILERPLATE = ("class_name", "namespace", "actor_id", "The actor died because")
"""Beginnings of the lines of Ray's messages that say nothing of the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer of a rank to a call, beside the columns that it wrote."""

    started: float
    finished: float
    """Unix seconds on the rank's node."""
    num_rows: int | None = None
    result: Any = None

    def packed(self) -> Any:
        """As it travels: plain numbers cost Ray half of what an object does."""
        return self if self.result is not None else [self.started, self.finished, self.num_rows]

    @classmethod
    def unpacked(cls, value: Any) -> Reply:
        if isinstance(value, Reply):
            return value
        started, finished, num_rows = value
        return cls(started=started, finished=finished, num_rows=num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A call under way: one reply reference per rank, and how to reach the processes if it goes
    wrong."""

    role: str
    method: str
    pool: str
    replies: tuple[Any, ...]
    stacks: Callable[[], dict[int, str]]
    kill: Callable[[str], None]
    describe_host: Callable[[int], str]
    activity: Callable[[], str]
    """The activity of its first rank, where it has a name (progress.py)."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Its pool's: how long no call may finish before the wait for it ends in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRecord:
    """A finished call.

    CallRecord(role="actor", method="update_actor", pool="main", ranks=((0.0, 1.2), (0.1, 1.1)))
    """

    role: str
    method: str
    pool: str
    ranks: tuple[tuple[float, float], ...]
    """When every rank began and ended, in Unix seconds on its node."""

    @property
    def started(self) -> float:
        """When the first rank began."""
        return min(started for started, _ in self.ranks)

    @property
    def finished(self) -> float:
        """When the last rank ended."""
        return max(finished for _, finished in self.ranks)

    @property
    def seconds(self) -> float:
        return self.finished - self.started


@dataclass(slots=True)
class Calls:
    """All calls of this process that were not yet seen to finish, and the records of those that
    were."""

    pending: list[Pending] = field(default_factory=list)
    records: list[CallRecord] = field(default_factory=list)
    last_progress: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    """Ctrl-C came. Python raises it wherever the process happens to be, and inside a callback
    of native code it is lost; the next wait raises it again."""

    def add(self, call: Pending) -> None:
        if not self.pending:
            self.last_progress = time.monotonic()
        self.pending.append(call)
        if len(self.pending) % 64 == 0:
            self.check()

    def get(self, refs: Sequence[Any]) -> list[Any]:
        """The values behind Ray references."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        refs = list(refs)
        while True:
            if self.interrupted:
                raise KeyboardInterrupt
            try:
                return ray.get(refs, timeout=POLL_S if self.pending else None)
            except GetTimeoutError:
                self.check()
            except RayError as error:
                self._fail(error)

    def check(self) -> None:
        """Raises if a pending call failed, its process died, or nothing has finished for too
        long."""
        import ray
        from ray.exceptions import RayError

        if self.interrupted:
            raise KeyboardInterrupt
        still = []
        for call in self.pending:
            done, waiting = ray.wait(list(call.replies), num_returns=len(call.replies), timeout=0)
            if done:
                try:
                    replies = [Reply.unpacked(reply) for reply in ray.get(done)]
                except RayError as error:
                    self._fail(error)
                if not waiting:
                    self.records.append(
                        CallRecord(
                            role=call.role,
                            method=call.method,
                            pool=call.pool,
                            ranks=tuple((reply.started, reply.finished) for reply in replies),
                        )
                    )
                    self.last_progress = time.monotonic()
                    continue
            still.append(call)
        self.pending = still
        timeout_s = min((call.timeout_s for call in self.pending), default=DEFAULT_TIMEOUT_S)
        if self.pending and time.monotonic() - self.last_progress > timeout_s:
            self._stuck(timeout_s)

    def under_way(self) -> str:
        """The call that each pool is at, and what it does there; "" while nothing is pending.
        Any thread may ask."""
        first: dict[str, Pending] = {}
        for call in list(self.pending):
            first.setdefault(call.pool, call)
        texts = []
        for call in first.values():
            activity = call.activity()
            texts.append(f"{call.role}.{call.method}" + (f": {activity}" if activity else ""))
        return ", ".join(texts)

    def finish(self) -> list[CallRecord]:
        """Waits for every pending call; returns and forgets the records made since the last
        time."""
        import ray

        while self.pending:
            ray.wait(_replies(self.pending), num_returns=1, timeout=0)
            ray.wait(
                list(self.pending[-1].replies),
                num_returns=len(self.pending[-1].replies),
                timeout=POLL_S,
            )
            self.check()
        records, self.records = self.records, []
        return records

    def forget(self, pool: str) -> None:
        """The pool is gone; nothing will come from it any more."""
        self.pending = [call for call in self.pending if call.pool != pool]
        self.records = [record for record in self.records if record.pool != pool]

    def _fail(self, error: Exception) -> None:
        """Raises what the controller should see instead of Ray's error, and stops pools whose
        ranks can't go on."""
        from ray.exceptions import RayActorError, RayTaskError

        pending, self.pending = self.pending, []
        if isinstance(error, RayActorError):
            _stop_dead(pending, _deaths(pending) or f"a worker process died: {_first_lines(error)}")
        cause = error.cause if isinstance(error, RayTaskError) else None
        if not isinstance(cause, WorkerError):
            raise error
        deaths = _settle(cause, pending)
        if deaths:
            # The peers of a dead process fail too, often before its death is known; they are not
            # the cause.
            peer = f"{cause.where}: {cause.cause}".partition("\n")[0]
            _stop_dead(pending, f"{deaths}; its peer failed with it: {peer}")
        raise cause from None

    def _stuck(self, timeout_s: float) -> None:
        pending, self.pending = self.pending, []
        report = _report(pending, timeout_s)
        for call in _one_per_pool(pending):
            call.kill("stuck: see the report of who waits for whom")
        raise WorkerStuck(report)


CALLS = Calls()
"""This process' calls. One runtime per process, as with Ray itself."""


def catch_interrupts() -> None:
    """Ctrl-C ends the run even if its exception gets lost in native code; for the main thread
    of a program's main."""

    def interrupt(signum: int, frame: object) -> None:
        CALLS.interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def get(refs: Sequence[Any]) -> list[Any]:
    return CALLS.get(refs)


def _one_per_pool(calls: Sequence[Pending]) -> list[Pending]:
    """A call of each pool."""
    return list({call.pool: call for call in calls}.values())


def _replies(calls: Sequence[Pending]) -> list[Any]:
    """The replies of all ranks of all calls."""
    return list(chain.from_iterable(call.replies for call in calls))


def _stop_dead(pending: Sequence[Pending], message: str) -> NoReturn:
    for call in _one_per_pool(pending):
        call.kill(message)
    raise WorkerDied(message) from None


def _deaths(pending: Sequence[Pending]) -> str:
    """One line for every rank of a pending call whose process is gone; empty if there is none."""
    import ray
    from ray.exceptions import RayActorError, RayError

    lines = []
    for call in pending:
        for rank, reply in enumerate(call.replies):
            done, _ = ray.wait([reply], timeout=0)
            try:
                ray.get(done)
            except RayActorError as death:
                lines.append(
                    f"{call.role} rank {rank} died in {call.method} ({call.describe_host(rank)}): "
                    f"{_first_lines(death)}"
                )
            except RayError:
                continue  # another rank's failure of another kind; deaths are what is looked for
    return "; ".join(dict.fromkeys(lines))


def _first_lines(error: Exception) -> str:
    """Ray's message without its blank and boilerplate lines."""
    lines = []
    for line in map(str.strip, str(error).splitlines()):
        if line and not line.startswith(BOILERPLATE):
            lines.append(line)
    return "; ".join(lines)[:1000]


def _settle(error: WorkerError, pending: Sequence[Pending]) -> str:
    """Gives the failed rank's peers a grace period. Returns the deaths that came to light; if there
    are none and peers still wait for the failed rank (in a collective, for ever), their pools are
    killed.

    Peers are the pool's other ranks, and calls of the same method in other pools: pools that work
    together (on a transfer of weights, say) do so in methods of one name.
    """
    import ray

    peers = []
    for call in pending:
        if call.pool == error.where.pool or call.method == error.where.method:
            peers.append(call)
    waiting: list[Any] = []
    if peers:
        replies = _replies(peers)
        _, waiting = ray.wait(replies, num_returns=len(replies), timeout=GRACE_S)
    deaths = _deaths(peers)
    if waiting and not deaths:
        stuck = [call for call in peers if not set(waiting).isdisjoint(call.replies)]
        for call in _one_per_pool(stuck):
            call.kill(f"its ranks wait for a rank that failed: {error.where}: {error.cause}")
    return deaths


def _report(pending: Sequence[Pending], timeout_s: float) -> str:
    import ray

    lines = [f"no call finished for {timeout_s:.0f} s. Waiting for:"]
    for call in pending:
        _, waiting = ray.wait(list(call.replies), num_returns=len(call.replies), timeout=0)
        ranks = [rank for rank, reply in enumerate(call.replies) if reply in waiting]
        lines.append(
            f"  {call.role}.{call.method} on pool {call.pool}: ranks {ranks} of "
            f"{len(call.replies)} have not answered"
        )
    for call in _one_per_pool(pending):
        for rank, stack in call.stacks().items():
            lines += [
                f"--- pool {call.pool} rank {rank} ({call.describe_host(rank)})",
                stack.rstrip(),
            ]
    return "\n".join(lines)
