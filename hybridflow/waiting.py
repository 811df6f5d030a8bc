"""Waiting: every wait of the controller watches all pending calls.

A failed call raises as soon as it is known, even if its result is not the one being read; a dead
process is named; and when a pool does not finish a call for longer than the call's deadline, the
wait ends in a report of who waits for whom with the stack of every rank, whatever the other pools
do meanwhile. Never in silence. In a host process nothing is pending, so a wait there is a plain
wait; its controller watches it.

A call's deadline is PoolSpec.call_timeout_s, or DEADLINE_FACTOR times the median of its earlier
runs where that is longer. A pool's clock stands still while the inputs of its call are not there, and
while nobody looks: this process may have been suspended, its machine or container with it.
After a failure the other pools' calls go on; `quiesce` waits for them.
"""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NoReturn

from hybridflow.blame import (
    all_replies,
    find_deaths,
    find_peers,
    first_lines,
    odd_first,
    one_per_pool,
    silent_ranks,
    standstill_report,
    unanswered,
    wait_for_peers,
)
from hybridflow.calls import CallRecord, Pending, Reply
from hybridflow.errors import NodeLeaves, Where, WorkerDied, WorkerError, WorkerStuck

POLL_S = 1.0
"""How often a wait looks at the other pending calls."""
AWAY_S = 10.0
"""Time between two looks that counts for a deadline."""
DEADLINE_FACTOR = 3.0
"""How many times its median duration a call may take where that is more than its pool's timeout."""
HISTORY = 20
"""Durations of a call that its median is taken over."""
COLLECTIVE = re.compile(r"gloo|NCCL|[Tt]imed out|Connection (closed|reset)|pair closure")
"""Messages of a collective operation whose partner does not answer: the rank that raises them is
not the cause."""


def nothing() -> None:
    return None


def nobody() -> dict[str, str]:
    return {}


@dataclass(slots=True)
class Calls:
    """All calls of this process that were not yet seen to finish, and the records of those that
    were."""

    pending: list[Pending] = field(default_factory=list)
    records: list[CallRecord] = field(default_factory=list)
    progress: dict[str, float] = field(default_factory=dict)
    """Pool -> when its first pending call got to the front (time.monotonic)."""
    looked_at: float = 0.0
    """When `check` was last called."""
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
    leaving: Callable[[], dict[str, str]] = nobody
    """Pool -> in words, which of its nodes was told to leave the cluster. Asked by every wait, at
    least once a second; the pools are ended then, and the wait raises."""
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
        """Raises if a pending call failed, its process died, its node leaves, or nothing has finished
        for too long."""
        self.beat()
        going = self.leaving()
        if going:
            self._leave(going)
        if self.interrupted:
            raise KeyboardInterrupt
        self.pending = [call for call in self.pending if not self._finished(call)]
        self._check_deadlines()

    def _finished(self, call: Pending) -> bool:
        """Whether every rank has answered, which is recorded; raises if one of them failed."""
        import ray
        from ray.exceptions import RayError

        done, waiting = ray.wait(list(call.replies), num_returns=len(call.replies), timeout=0)
        if not done:
            return False
        try:
            values = ray.get(done)
        except RayError as error:
            self._fail(error)
        if waiting:
            return False
        self.progress[call.pool] = time.monotonic()
        if call.answers_reply:
            self._record(call, list(map(Reply.unpacked, values)))
        return True

    def _record(self, call: Pending, replies: Sequence[Reply]) -> None:
        record = CallRecord(
            role=call.role,
            method=call.method,
            pool=call.pool,
            ranks=tuple((reply.started, reply.finished) for reply in replies),
            peak_bytes=tuple(reply.peak_bytes for reply in replies),
        )
        self.records.append(record)
        self.history.setdefault(call.name, deque(maxlen=HISTORY)).append(record.seconds)

    def deadline_s(self, call: Pending) -> float:
        """How long the call may take once its pool has come to it."""
        seconds = self.history.get(call.name)
        return max(call.timeout_s, DEADLINE_FACTOR * median(seconds) if seconds else 0.0)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        away_s, self.looked_at = now - self.looked_at - AWAY_S, now
        if away_s > 0:
            for pool, since in self.progress.items():
                self.progress[pool] = min(now, since + away_s)
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
        calls, self.abandoned = [*self.abandoned, *self.pending], []
        self.pending = []
        waiting, deadline = all_replies(calls), time.monotonic() + within_s
        while waiting and time.monotonic() < deadline:
            self.beat()
            if self.interrupted:
                raise KeyboardInterrupt
            waiting = unanswered(waiting, POLL_S)
        late = [call for call in calls if not set(waiting).isdisjoint(call.replies)]
        for call in one_per_pool(late):
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
        while calls := [call for call in self.pending if not self._in_background(call)]:
            unanswered(all_replies(calls), 0)
            last = list(calls[-1].replies)
            if self._attend():
                self._wait_or_attend(last)
            else:
                unanswered(last, POLL_S)
            self.check()
        records, self.records = self.records, []
        return records

    def detach(self) -> None:
        """Nothing goes on in the background any more."""
        self.while_waiting = nothing
        self.leaving = nobody
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
            more = [ref for ref in all_replies(background) if ref not in late]
            behind = unanswered(more, 0) if more else []
            ray.wait([late[0], *behind], num_returns=1, timeout=POLL_S)

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
            deaths = find_deaths(pending)
            if not deaths:  # of a process that has no call under way: any pool may depend on it
                for call in one_per_pool(pending):
                    call.kill(f"a worker process died: {first_lines(error)}")
                raise WorkerDied(f"a worker process died: {first_lines(error)}") from None
            _stop_dead(pending, deaths)
        cause = error.cause if isinstance(error, RayTaskError) else None
        if not isinstance(cause, WorkerError):
            raise error
        peers = find_peers(cause, pending)
        waiting = wait_for_peers(peers)
        deaths = find_deaths(peers)
        if deaths:
            # The peers of a dead process fail too, often before its death is known; they are not
            # the cause.
            peer = f"{cause.where}: {cause.cause}".partition("\n")[0]
            _stop_dead(pending, deaths, f"; its peer failed with it: {peer}")
        stuck = [call for call in peers if not set(waiting).isdisjoint(call.replies)]
        if stuck and COLLECTIVE.search(cause.cause):
            first_line = f"{cause.where}: {cause.cause}".partition("\n")[0]
            self._stop_stuck(stuck, peers, f"a collective operation failed: {first_line}")
        for call in one_per_pool(stuck):
            call.kill(f"its ranks wait for a rank that failed: {cause.where}: {cause.cause}")
        raise cause from None

    def _leave(self, going: Mapping[str, str]) -> NoReturn:
        """Ends the pools on nodes that leave: no call is waited for."""
        pending, self.pending = self.pending, []
        self.abandoned, self.while_waiting = pending, nothing
        of_pools = one_per_pool([call for call in pending if call.pool in going])
        for call in of_pools:
            call.kill(going[call.pool])
        places = [call.place(0) for call in of_pools]
        for pool in going:
            if all(place.pool != pool for place in places):  # it was at nothing
                places.append(Where(role="", rank=-1, method="", pool=pool))
        raise NodeLeaves("; ".join(dict.fromkeys(going.values())), tuple(places))

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
        stacks = {call.pool: call.stacks() for call in one_per_pool([*late, *pending])}
        places = []
        for call in late:
            silent = silent_ranks(call)
            for rank in odd_first(stacks[call.pool]):
                if rank in silent:
                    places.append(call.place(rank))
        report = standstill_report(reason, pending, stacks)
        for call in one_per_pool(late):
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


def _stop_dead(
    pending: Sequence[Pending], deaths: Sequence[tuple[Pending, int, str]], addition: str = ""
) -> NoReturn:
    """Kills the pools of the dead ranks and says who died."""
    message = "; ".join(dict.fromkeys(line for _, _, line in deaths)) + addition
    for call in one_per_pool([call for call, _, _ in deaths]):
        call.kill(message)
    places = dict.fromkeys(call.place(rank) for call, rank, _ in deaths)
    first_of_rank = {(place.pool, place.rank): place for place in reversed(places)}
    raise WorkerDied(message, tuple(reversed(first_of_rank.values()))) from None
