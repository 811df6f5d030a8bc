"""The errors that cross a process boundary: each says which role, rank and method, and carries the remote
traceback."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The place of a failure: Where(role="actor", rank=1, method="update_actor", pool="main",
    node="10.0.0.7", pid=4711)."""

    role: str
    rank: int
    method: str
    pool: str = "main"
    node: str = ""
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank} in {self.method} (pool {self.pool}, node {self.node}, pid {self.pid})"


class WorkerError(RuntimeError):
    """A worker's method raised. `where` says who, `cause` the original message, `remote_traceback` the stack
    over there."""

    def __init__(self, where: Where, cause: str, remote_traceback: str) -> None:
        super().__init__(where, cause, remote_traceback)
        self.where = where
        self.cause = cause
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}\n\n{self.remote_traceback}"


class WorkerValueError(WorkerError, ValueError):
    """The worker's error was a ValueError: the user's input, not the machinery."""


class WorkerDied(RuntimeError):
    """A process of the pool is gone (killed, out of memory, crashed, its node lost)."""


class WorkerStuck(RuntimeError):
    """Nothing finished for the configured time; the message holds who waits for whom and every rank's
    stack."""
