"""Waiting: every wait of the controller watches all pending calls.

A failed call raises as soon as it is known, even if its result is not the one being read; a dead
process is named; and when a pool does not finish a call for longer than the call's deadline, the
wait ends in a report of who waits for whom with the stack of every rank, whatever the other pools
do meanwhile. Never in silence. In a host process nothing is pending, so a wait there is a plain
wait; its controller watches it.

A call's deadline is PoolSpec.call_timeout_s, or DEADLINE_FACTOR times the median of its earlier
runs where that is longer. A pool's clock stands still while the inputs of its call are not there.
After a failure the other pools' calls go on; `quiesce` waits for them.
"""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any, NoReturn

from hybridflow.errors import Where, WorkerDied, WorkerError, WorkerStuck

POLL_S = 1.0
"""How often a wait looks at the other pending calls."""
GRACE_S = 5.0
"""How long the other ranks of a failed call may take to finish before the pool is taken for stuck
and killed.
"""
DEFAULT_TIMEOUT_S = 1800.0
DEADLINE_FACTOR = 3.0
"""How many times its median duration a call may take where that is more than its pool's timeout."""
HISTORY = 20
"""Durations of a call that its median is taken over."""
COLLECTIVE = re.compile(r"gloo|NCCL|[Tt]imed out|Connection (closed|reset)|pair closure")
"""Messages of a collective operation whose partner does not answer: the rank that raises them is
not the cause."""
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
    """Its pool's: how long it may take before the wait for it ends in a report."""
    inputs: tuple[Any, ...] = ()
    """References to the columns that it reads; it begins when all of them are there."""
    answers_reply: bool = True
    """False for calls of the pool's own start, which answer anything and are not recorded."""

    @property
    def name(self) -> str:
        return f"{self.role}.{self.method}"

    def has_inputs(self) -> bool:
        import ray

        refs = list(self.inputs)
        return not refs or not ray.wait(refs, num_returns=len(refs), timeout=0)[1]

    def place(self, rank: int) -> Where:
        return Where(role=self.role, rank=rank, method=self.method, pool=self.pool)


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


def nothing() -> None:
    return None


@dataclass(slots=True)
class Calls:
    """All calls of this process that were not yet seen to finish, and the records of those that
    were."""

    pending: list[Pending] = field(default_factory=list)
    records: list[CallRecord] = field(default_factory=list)
    progress: dict[str, float] = field(default_factory=dict)
    """Pool -> when its first pending call got to the front (time.monotonic)."""
    history: dict[str, deque[float]] = field(default_factory=dict)
    """Call -> seconds of its latest runs."""
    abandoned: list[Pending] = field(default_factory=list)
    """Calls that were under way in other pools when a call failed; see quiesce."""
    beat: Callable[[], None] = nothing
    """Called by every wait at least once a second: the sign of life for a supervisor."""
    while_waiting: Callable[[], None] = nothing
    """Called by every wait, and again whenever a call of `background` ends: it may start calls. A
    failure takes it away."""
    background: set[tuple[str, str]] = field(default_factory=set)
    """(pool, method) of calls that `finish` does not wait for."""
    attending: bool = False
    """while_waiting is being called, and may wait itself."""
    interrupted: bool = False
    """Ctrl-C came. Python raises it wherever the process happens to be, and inside a callback
    of native code it is lost; the next wait raises it again."""

    def add(self, call: Pending) -> None:
        if all(other.pool != call.pool for other in self.pending):
            self.progress[call.pool] = time.monotonic()
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
                watched = self.pending or self.beat is not nothing
                timeout_s = POLL_S if watched else None
                if self._attend():
                    self._wait_or_attend(refs)
                    timeout_s = 0
                return ray.get(refs, timeout=timeout_s)
            except GetTimeoutError:
                self.check()
            except RayError as error:
                self._fail(error)

    def check(self) -> None:
        """Raises if a pending call failed, its process died, or nothing has finished for too
        long."""
        import ray
        from ray.exceptions import RayError

        self.beat()
        if self.interrupted:
            raise KeyboardInterrupt
        still = []
        for call in self.pending:
            done, waiting = ray.wait(list(call.replies), num_returns=len(call.replies), timeout=0)
            if done:
                try:
                    values = ray.get(done)
                except RayError as error:
                    self._fail(error)
                if not waiting:
                    self.progress[call.pool] = time.monotonic()
                    if call.answers_reply:
                        self._record(call, list(map(Reply.unpacked, values)))
                    continue
            still.append(call)
        self.pending = still
        self._check_deadlines()

    def _record(self, call: Pending, replies: Sequence[Reply]) -> None:
        record = CallRecord(
            role=call.role,
            method=call.method,
            pool=call.pool,
            ranks=tuple((reply.started, reply.finished) for reply in replies),
        )
        self.records.append(record)
        self.history.setdefault(call.name, deque(maxlen=HISTORY)).append(record.seconds)

    def deadline_s(self, call: Pending) -> float:
        """How long the call may take once its pool has come to it."""
        seconds = self.history.get(call.name)
        return max(call.timeout_s, DEADLINE_FACTOR * median(seconds) if seconds else 0.0)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        first: dict[str, Pending] = {}
        for call in self.pending:
            first.setdefault(call.pool, call)
        late = []
        for pool, call in first.items():
            if now - self.progress[pool] <= self.deadline_s(call):
                continue
            if call.has_inputs():
                late.append(call)
            else:
                self.progress[pool] = now
        if late:
            self._stuck(late)

    def quiesce(self, within_s: float) -> None:
        """Waits until the calls that a failure left under way have ended, whatever came of them;
        kills the pools of those that have not within that time. Nothing is recorded of them."""
        import ray

        calls, self.abandoned = [*self.abandoned, *self.pending], []
        self.pending = []
        waiting, deadline = _replies(calls), time.monotonic() + within_s
        while waiting and time.monotonic() < deadline:
            self.beat()
            if self.interrupted:
                raise KeyboardInterrupt
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        late = [call for call in calls if not set(waiting).isdisjoint(call.replies)]
        for call in _one_per_pool(late):
            call.kill(f"{call.name} did not end within {within_s:.0f} s after a failure elsewhere")
        self.records = []

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
        """Waits for every pending call that is not in the background; returns and forgets the
        records made since the last time."""
        import ray

        while calls := [call for call in self.pending if not self._in_background(call)]:
            ray.wait(_replies(calls), num_returns=1, timeout=0)
            last = list(calls[-1].replies)
            if self._attend():
                self._wait_or_attend(last)
            else:
                ray.wait(last, num_returns=len(last), timeout=POLL_S)
            self.check()
        records, self.records = self.records, []
        return records

    def detach(self) -> None:
        """Nothing goes on in the background any more."""
        self.while_waiting = nothing
        self.background.clear()

    def _in_background(self, call: Pending) -> bool:
        return (call.pool, call.method) in self.background

    def _attend(self) -> bool:
        """Calls while_waiting; whether calls in the background are under way."""
        if self.attending or self.while_waiting is nothing:
            return False
        self.attending = True
        try:
            self.while_waiting()
        finally:
            self.attending = False
        return any(map(self._in_background, self.pending))

    def _wait_or_attend(self, refs: Sequence[Any]) -> None:
        """Returns when one more of `refs`, or of the replies in the background, is there, and
        after POLL_S."""
        import ray

        background = [call for call in self.pending if self._in_background(call)]
        refs = list(dict.fromkeys(refs))
        _, late = ray.wait(refs, num_returns=len(refs), timeout=0)
        if late:
            more = [ref for ref in _replies(background) if ref not in late]
            _, unanswered = ray.wait(more, num_returns=len(more), timeout=0) if more else ([], [])
            ray.wait([late[0], *unanswered], num_returns=1, timeout=POLL_S)

    def forget(self, pool: str) -> None:
        """The pool is gone; nothing will come from it any more."""
        self.pending = [call for call in self.pending if call.pool != pool]
        self.abandoned = [call for call in self.abandoned if call.pool != pool]
        self.records = [record for record in self.records if record.pool != pool]

    def _fail(self, error: Exception) -> None:
        """Raises what the controller should see instead of Ray's error, and stops pools whose
        ranks can't go on. The calls of the other pools are left to quiesce."""
        from ray.exceptions import RayActorError, RayTaskError

        pending, self.pending = self.pending, []
        self.abandoned, self.while_waiting = pending, nothing
        if isinstance(error, RayActorError):
            deaths = _deaths(pending)
            if not deaths:  # of a process that has no call under way: any pool may depend on it
                for call in _one_per_pool(pending):
                    call.kill(f"a worker process died: {_first_lines(error)}")
                raise WorkerDied(f"a worker process died: {_first_lines(error)}") from None
            _stop_dead(pending, deaths)
        cause = error.cause if isinstance(error, RayTaskError) else None
        if not isinstance(cause, WorkerError):
            raise error
        peers = _peers(cause, pending)
        waiting = _wait_for_peers(peers)
        deaths = _deaths(peers)
        if deaths:
            # The peers of a dead process fail too, often before its death is known; they are not
            # the cause.
            peer = f"{cause.where}: {cause.cause}".partition("\n")[0]
            _stop_dead(pending, deaths, f"; its peer failed with it: {peer}")
        stuck = [call for call in peers if not set(waiting).isdisjoint(call.replies)]
        if stuck and COLLECTIVE.search(cause.cause):
            first_line = f"{cause.where}: {cause.cause}".partition("\n")[0]
            self._stop_stuck(stuck, peers, f"a collective operation failed: {first_line}")
        for call in _one_per_pool(stuck):
            call.kill(f"its ranks wait for a rank that failed: {cause.where}: {cause.cause}")
        raise cause from None

    def _stuck(self, late: Sequence[Pending]) -> NoReturn:
        """`late`: the call of each pool that is over its deadline."""
        pending, self.pending = self.pending, []
        self.abandoned, self.while_waiting = pending, nothing
        seconds = max(map(self.deadline_s, late))
        self._stop_stuck(late, pending, f"no call finished for {seconds:.0f} s")

    def _stop_stuck(
        self, late: Sequence[Pending], pending: Sequence[Pending], reason: str
    ) -> NoReturn:
        """Kills the late calls' pools after their stacks were read, and raises the report."""
        stacks = {call.pool: call.stacks() for call in _one_per_pool([*late, *pending])}
        places = []
        for call in late:
            silent = _silent_ranks(call)
            for rank in odd_first(stacks[call.pool]):
                if rank in silent:
                    places.append(call.place(rank))
        report = _report(reason, pending, stacks)
        for call in _one_per_pool(late):
            call.kill("stuck: see the report of who waits for whom")
        raise WorkerStuck(report, tuple(places)) from None


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


def _stop_dead(
    pending: Sequence[Pending], deaths: Sequence[tuple[Pending, int, str]], addition: str = ""
) -> NoReturn:
    """Kills the pools of the dead ranks and says who died."""
    message = "; ".join(dict.fromkeys(line for _, _, line in deaths)) + addition
    for call in _one_per_pool([call for call, _, _ in deaths]):
        call.kill(message)
    places = dict.fromkeys(call.place(rank) for call, rank, _ in deaths)
    first_of_rank = {(place.pool, place.rank): place for place in reversed(places)}
    raise WorkerDied(message, tuple(reversed(first_of_rank.values()))) from None


def _deaths(pending: Sequence[Pending]) -> list[tuple[Pending, int, str]]:
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
                line = (
                    f"{call.role} rank {rank} died in {call.method} ({call.describe_host(rank)}): "
                    f"{_first_lines(death)}"
                )
                deaths.append((call, rank, line))
            except RayError:
                continue  # another rank's failure of another kind; deaths are what is looked for
    return deaths


def _first_lines(error: Exception) -> str:
    """Ray's message without its blank and boilerplate lines."""
    lines = []
    for line in map(str.strip, str(error).splitlines()):
        if line and not line.startswith(BOILERPLATE):
            lines.append(line)
    return "; ".join(lines)[:1000]


def _peers(error: WorkerError, pending: Sequence[Pending]) -> list[Pending]:
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


def _wait_for_peers(peers: Sequence[Pending]) -> list[Any]:
    """The replies that are not there after a grace period. Those peers wait for the failed rank,
    in a collective for ever, or it waited for them."""
    import ray

    replies = _replies(peers)
    if not replies:
        return []
    return ray.wait(replies, num_returns=len(replies), timeout=GRACE_S)[1]


def _silent_ranks(call: Pending) -> list[int]:
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


def _report(reason: str, pending: Sequence[Pending], stacks: dict[str, dict[int, str]]) -> str:
    lines = [f"{reason}. Waiting for:"]
    for call in pending:
        lines.append(
            f"  {call.name} on pool {call.pool}: ranks {_silent_ranks(call)} of "
            f"{len(call.replies)} have not answered"
        )
    for call in _one_per_pool(pending):
        for rank in odd_first(stacks[call.pool]):
            lines += [
                f"--- pool {call.pool} rank {rank} ({call.describe_host(rank)})",
                stacks[call.pool][rank].rstrip(),
            ]
    return "\n".join(lines)
