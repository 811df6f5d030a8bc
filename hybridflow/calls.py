"""Calls: what is known of a call under way, of a rank's answer to it, and of a finished one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybridflow.errors import Where

DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer of a rank to a call, beside the columns that it wrote."""

    started: float
    finished: float
    """Unix seconds on the rank's node."""
    num_rows: int | None = None
    result: Any = None
    peak_bytes: tuple[int, int] = (0, 0)
    """The most memory that the process held so far: of the host, of its device (devices.py)."""

    def packed(self) -> Any:
        """As it travels: plain numbers cost Ray half of what an object does."""
        if self.result is not None:
            return self
        return [self.started, self.finished, self.num_rows, *self.peak_bytes]

    @classmethod
    def unpacked(cls, value: Any) -> Reply:
        if isinstance(value, Reply):
            return value
        started, finished, num_rows, *peak = value
        host, device = peak
        return cls(started=started, finished=finished, num_rows=num_rows, peak_bytes=(host, device))


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
    explain_death: Callable[[int], str]
    """In words: what the rank's node says of the end of its process; empty where it says nothing."""
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
    peak_bytes: tuple[tuple[int, int], ...] = ()
    """The most memory that every rank's process held so far: of the host, of its device."""

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
