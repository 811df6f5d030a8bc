"""Failures of worker processes as values, and the file that every failure and recovery of a run is
written to.

    failure, evidence = describe(error, step=12)
    events.write("failure", failure=asdict(failure), evidence=evidence)

Leaves out what is done about it (controllers/recovery.py).
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridflow.disk import LineFile
from hybridflow.errors import (
    NodeLeaves,
    NotFiniteError,
    UserCodeError,
    Where,
    WorkerDied,
    WorkerError,
    WorkerStuck,
)
from hybridflow.recovery.events import Failure, Kind

EVIDENCE_CHARACTERS = 20_000
EVENTS = "events.jsonl"
RECOVERABLE = (WorkerDied, WorkerStuck, WorkerError)
"""Errors of worker processes, which a restart of their pool may get over."""
PARTICULARS = re.compile(r"\(pid [^)]*\)|\bpid \d+|0x[0-9a-f]+")
"""Process ids and addresses of objects, which differ between two failures of one kind."""


def describe(error: BaseException, step: int) -> tuple[Failure, str]:
    """The failure that an error of worker processes tells of, and the evidence: remote traceback,
    stacks, Ray's words. `step` was under way. Raises a TypeError for any other error."""
    places: tuple[Where, ...]
    if isinstance(error, WorkerError):
        kind, places, cause = Kind.raised, (error.where,), error.cause
    elif isinstance(error, WorkerDied):
        kind = Kind.node_lost if isinstance(error, NodeLeaves) else Kind.died
        places, cause = error.places, str(error)
    elif isinstance(error, WorkerStuck):
        kind, places, cause = Kind.hung, error.places, str(error)
    else:
        raise TypeError(f"{type(error).__name__} is no failure of a worker: {error}")
    if not may_be_retried(error):
        kind = Kind.user_error
    where = next(iter(places), Where(role="", rank=-1, method="", pool=""))
    failure = Failure(
        kind=kind,
        pool=where.pool,
        role=where.role,
        rank=where.rank,
        method=where.method,
        cause=PARTICULARS.sub("", cause.partition("\n")[0]),
        step=step,
    )
    return failure, str(error)[:EVIDENCE_CHARACTERS]


def failed_pools(error: BaseException) -> set[str]:
    """The pools whose processes the error is about."""
    if isinstance(error, WorkerError):
        return {error.where.pool}
    if isinstance(error, WorkerDied | WorkerStuck):
        return {place.pool for place in error.places}
    return set()


def may_be_retried(error: BaseException) -> bool:
    """Whether a restart can help: never against a mistake in the settings or in the user's own
    code, or against a gradient that is not finite (optimizer.on_nonfinite=stop)."""
    final = ValueError | UserCodeError | NotFiniteError
    return isinstance(error, RECOVERABLE) and not isinstance(error, final)


class EventLog:
    """<output_dir>/events.jsonl: failures, restarts and recoveries, a JSON object a line, on disk
    before the next thing happens.

    EventLog(directory, attempt=2).write("recovered", step=12, seconds=4.5)
    """

    def __init__(self, directory: Path, attempt: int = 0) -> None:
        self.path = directory / EVENTS
        self.attempt = attempt
        self._file = LineFile(self.path, synced=True)

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Returns the line."""
        line = {"event": event, "time_s": time.time(), "attempt": self.attempt, **fields}
        self._file.append(json.dumps(line))
        return line

    def flush(self) -> None:
        """Writes the events that waited for room on a full disk, where there is some."""
        self._file.try_writing(quiet=True)

    def read(self) -> list[dict[str, Any]]:
        """Every event so far, oldest first; a line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events
