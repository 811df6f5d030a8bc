"""State: everything that recovery's decisions remember, as plain data that is never changed in place.

    state = begin(Policy(max_restarts=3, flush_every=10))
    state.phase, state.staged, state.durable, state.budget

What becomes of it after an event is decided in machine.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hybridflow.recovery.budget import Budget
from hybridflow.recovery.events import Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The settings that decisions depend on (recovery.* and loop.*)."""

    max_restarts: int = 3
    snapshot_every: int = 1
    """Steps between snapshots in memory; 0: only those that are flushed."""
    flush_every: int = 0
    """Steps between flushes to disk; 0: only after the last step."""
    flush_seconds: float = 0.0
    """A flush is due as well when the last one is so long ago; 0: never for that."""
    export_every: int = 0
    """Steps between exports, where they are flushed; the last step is always exported, and a step
    that is flushed with the best validation so far."""
    disk_grace_s: float = 600.0
    """How long the disk may fail, or one flush may take, before the run stops."""
    deterministic: bool = False
    """Whether a replayed step with another digest stops the run; it is reported in any case."""


class Phase(StrEnum):
    starting = "starting"
    stepping = "stepping"
    staging = "staging"
    finishing = "finishing"
    """The last step is staged; its commit on disk is waited for."""
    quiescing = "quiescing"
    rebuilding = "rebuilding"
    restoring = "restoring"
    leaving = "leaving"
    """A notice came; the newest snapshot is flushed until the deadline."""
    stopped = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class FlushUnderWay:
    step: int
    number: int
    since: float


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Everything that decide remembers; its fields are never changed in place."""

    policy: Policy
    budget: Budget
    phase: Phase = Phase.starting
    incarnation: int = 0
    pools: tuple[str, ...] = ()
    """All pools."""
    built: Mapping[str, int] = field(default_factory=dict)
    """The incarnation in which a pool was last rebuilt; 0 where it is missing."""
    step: int = 0
    """The step under way, or the last one that ended."""
    last: bool = False
    """Whether the run ends with it."""
    staged: tuple[int, ...] = ()
    durable: tuple[int, ...] = ()
    without_model: frozenset[int] = frozenset()
    """Steps whose commit on disk holds no Hugging Face directory."""
    damaged: frozenset[tuple[int, Place]] = frozenset()
    """Commits that are not restored again."""
    avoided: frozenset[tuple[int, Place]] = frozenset()
    """Commits whose restore failed twice: restored only where there is no other."""
    restoring: tuple[int, Place] = (-1, Place.start)
    restore_failures: int = 0
    """In a row, of the commit that is being restored."""
    digests: Mapping[int, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    """Pools to rebuild in the recovery under way, until they are all up."""
    flush: FlushUnderWay | None = None
    num_flushes: int = 0
    flushed_at: float = 0.0
    """When the last flush was committed, or this attempt began."""
    disk_failing_since: float | None = None
    not_exported: int | None = None
    """The step whose export failed; the last step's is tried again before its commit."""
    deadline: float = 0.0
    """When leaving ends."""


def begin(policy: Policy) -> State:
    return State(policy=policy, budget=Budget(max_restarts=policy.max_restarts))
