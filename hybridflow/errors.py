"""The errors that cross a process boundary: each names role, rank and method and carries the remote
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
        process = f"pool {self.pool}, node {self.node}, pid {self.pid}"
        return f"{self.role} rank {self.rank} in {self.method} ({process})"


class WorkerError(RuntimeError):
    """A worker's method raised: `where` names it, `cause` is the original message,
    `remote_traceback` the stack in the worker's process."""

    def __init__(self, where: Where, cause: str, remote_traceback: str) -> None:
        super().__init__(where, cause, remote_traceback)
        self.where = where
        self.cause = cause
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}\n\n{self.remote_traceback}"


class WorkerValueError(WorkerError, ValueError):
    """A worker's method raised a ValueError, as it does for mistakes of the user."""


class TooFewDevices(ValueError):
    """A pool's devices could not be reserved in time."""


class UserCodeError(RuntimeError):
    """Code of the user's, such as a reward function, raised or returned what nobody can use: the
    message is one line that names it and the row."""


class WorkerUserCodeError(WorkerError, UserCodeError):
    """A worker's method raised a UserCodeError."""


class NotFiniteError(RuntimeError):
    """The norm of a gradient is infinite or NaN. The weights were not changed by its step."""


class WorkerNotFinite(WorkerError, NotFiniteError):
    """A worker's method raised a NotFiniteError."""


class WorkerDied(RuntimeError):
    """A process of the pool is gone (killed, out of memory, crashed, its node lost). `places`
    names each dead rank and the call that it was in, where that is known."""

    def __init__(self, message: str, places: tuple[Where, ...] = ()) -> None:
        super().__init__(message)
        self.places = places


class NodeLeaves(WorkerDied):
    """A node with processes of the pool was told to leave its cluster: they were ended, and what its
    memory holds can still be had for a while."""


class WorkerStuck(RuntimeError):
    """No call finished for the configured time; the message says who waits for whom and has
    every rank's stack. `places` names the ranks that did not answer."""

    def __init__(self, message: str, places: tuple[Where, ...] = ()) -> None:
        super().__init__(message)
        self.places = places
