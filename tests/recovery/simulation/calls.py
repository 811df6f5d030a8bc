"""Calls of a controller in virtual time: collective over a role's ranks, one small wait at a time, with
the events that come meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybridflow.recovery import attempts
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action
from hybridflow.recovery.attempts import Attempt
from hybridflow.recovery.events import Event, Failure, Kind, Place
from hybridflow.recovery.machine import decide
from hybridflow.recovery.state import Phase, Policy, State, begin
from tests.recovery.simulation.bugs import Bugs
from tests.recovery.simulation.cluster import Cluster, Rank, Wait, Weights
from tests.recovery.simulation.crash_files import File, SimulatedPath

CALL_DEADLINE_S = 20.0
RUN = "run"


class Lost(Exception):
    """An action was answered by Failed or Fenced."""

    def __init__(self, event: Event) -> None:
        super().__init__(str(event))
        self.event = event


class Abandoned(Exception):
    """An event that came meanwhile ended the action."""

    def __init__(self, actions: tuple[Action, ...]) -> None:
        super().__init__()
        self.actions = actions


@dataclass(slots=True)
class Watch:
    """What the rules look at; filled by all attempts of a run."""

    restores: list[tuple[int, Place]]
    broken: list[str]
    restarts: int = 0
    """Rebuilds since the last step that was committed for the first time."""
    furthest: int = -1
    durable: bool = False
    num_events: int = 0

    def committed(self, step: int) -> None:
        if step > self.furthest:
            self.furthest, self.restarts = step, 0


class Calls(ABC):
    """What a controller knows, and how it calls its ranks."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        attempt: int,
        layout: dict[str, list[tuple[str, int]]],
        policy: Policy,
        num_steps: int,
        bugs: Bugs,
        watch: Watch,
        expected: Callable[[int], Any],
        flush_seconds: Callable[[], float],
        doubled: frozenset[int],
        not_finite: frozenset[int],
        exports: bool,
    ) -> None:
        """`not_finite`: positions of the rows whose gradient is not finite."""
        self.cluster, self.attempt, self.layout = cluster, attempt, layout
        self.num_steps, self.bugs, self.watch = num_steps, bugs, watch
        self.expected, self.flush_seconds, self.doubled = expected, flush_seconds, doubled
        self.not_finite, self.exports = not_finite, exports
        self.given_up: set[int] = set()
        """Positions of the rows that this controller passes over."""
        self.state: State = begin(policy)
        self.inbox: deque[Event] = deque()
        self.status: int | None = None
        self.reason = ""
        self.position = 0
        self.synced = 0
        """The controller's belief: the version of the actor that the generator holds."""
        self.version = 0
        """The number of the actor's updates."""
        self.rows: tuple[int, ...] = ()
        self.restored: Any = None
        self.root = SimulatedPath(cluster.files, RUN)
        self.claim: Attempt
        self.store: Any
        self.ledger: File | None = None
        self.ledger_waits = False
        """Whether the disk had no room for the ledger since it was rewritten."""
        self.doing: Action | None = None

    def decide(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = decide(self.state, event, self.cluster.now)
        return actions

    def put(self, event: Event) -> None:
        self.watch.num_events += 1
        self.inbox.append(event)
        if self.watch.num_events in self.doubled and not isinstance(event, on.Pruned):
            self.cluster.after(5.0, lambda: self.inbox.append(event))

    def poll(self) -> Wait:
        """Takes the events that came while an action waits."""
        while self.inbox:
            incarnation = self.state.incarnation
            actions = self.decide(self.inbox.popleft())
            ended = self.state.phase in (Phase.leaving, Phase.stopped)
            if ended or self.state.incarnation != incarnation:
                raise Abandoned(actions)
            for action in actions:
                yield from self.carry_out(action)

    @abstractmethod
    def carry_out(self, action: Action) -> Wait:
        """Carries out one action of the machine."""

    def check_fence(self) -> Wait:
        try:
            self.claim.check()
        except attempts.Fenced:
            raise Lost(on.Fenced()) from None
        yield 0.01  # an attempt that begins here is not seen any more

    def ranks(self, role: str) -> list[Rank]:
        return [
            rank
            for rank in self.cluster.ranks
            if rank.attempt == self.attempt and rank.role == role
        ]

    def wait(self, seconds: float) -> Wait:
        left = seconds
        while left > 0:
            yield min(left, 1.0)
            left -= 1.0
            yield from self.poll()

    def call(
        self, role: str, seconds: float, method: str, work: Callable[[Rank], None] | None = None
    ) -> Wait:
        """A collective call: works on the first rank halfway, on the others at its end."""
        ranks = self.ranks(role)
        yield from self.wait(seconds / 2)
        if work is not None and not ranks[0].trouble:
            work(ranks[0])
        yield from self.wait(seconds / 2)
        for rank in ranks:
            if rank.trouble:
                yield from self.notice(rank, method)
        for rank in ranks[1:]:
            if work is not None:
                work(rank)

    def notice(self, rank: Rank, method: str) -> Wait:
        """Reports the rank that died, hung, or raised; a hang shows at the deadline."""
        if rank.trouble == "hung":
            yield from self.wait(CALL_DEADLINE_S)
        kind = Kind(rank.trouble) if rank.trouble else Kind.died
        failure = Failure(
            kind=kind,
            pool=rank.pool,
            role=rank.role,
            rank=rank.index,
            method=method,
            cause=f"{kind} at {self.cluster.now:.3f}" if kind is Kind.raised else kind,
            step=self.state.step,
        )
        self.watch.num_events += 1
        failed = on.Failed(failure=failure, incarnation=rank.incarnation)
        if self.watch.num_events in self.doubled:
            self.cluster.after(7.0, lambda: self.inbox.append(failed))
        raise Lost(failed)

    def weights(self, role: str) -> Weights:
        tensors: Weights = {}
        for rank in self.ranks(role):
            tensors |= rank.tensors
        return tensors
