"""Actions: what the driver carries out, in order, each to its end, with the event that answers it.

    RunStep -> StepDone     Stage -> Staged         Flush -> Flushed or FlushFailed, later
    Commit -> Committed     Quiesce -> Quiesced     Rebuild -> Rebuilt or TooFewDevices
    Prune of the disk -> Pruned                     Restore -> Restored or RestoreFailed
    Export -> ExportFailed or nothing
    and the others -> nothing

Any action may be answered by Failed or Fenced instead, and then the rest of its list is dropped.
Flush alone goes on in the background. Every action may be repeated after a crash inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from hybridflow.recovery.events import Failure, Place


class Exit(IntEnum):
    """The controller's exit status, for its supervisor and for the scheduler above it."""

    done = 0
    failed = 1
    """And any status not named here: the controller crashed; its supervisor starts it again."""
    user_error = 2
    preempted = 75
    """Put this job back into the queue."""
    other_layout = 76
    """Start this job again with a layout for the devices that are left."""
    fenced = 77
    """A newer attempt runs; not to be started again."""
    gave_up = 78
    """The budget is spent, or going on would be wrong; not to be started again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStep:
    """Trains one step on the next rows, and validates where that is due. Step 0 is the validation
    before the first step, and trains nothing."""

    step: int
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Writes every trained rank's files and the controller's record (positions, ledger head,
    metrics) of a step to memory, and commits them there by rename. Checks the fence first."""

    step: int
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Logs what is not logged yet up to this step: ledger, metrics, samples. Checks the fence
    first."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Writes the Hugging Face directory of the step that the roles hold, for its commit on disk.
    What the disk refuses ends no process, and leaves nothing behind."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Flush:
    """Copies a step's files from memory to disk and syncs them, in the background, into a directory
    that no other attempt and no other number uses. Gives up the flush before it."""

    step: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """Makes a flushed step durable: ledger and metrics synced, manifest synced, rename, directory
    synced. Checks the fence first."""

    step: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Removes the commits of a place that retention does not hold, never one of `protected`. Checks
    the fence first."""

    place: Place
    protected: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """Renames a commit that could not be restored, so that nothing reads it again; people may."""

    step: int
    place: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Appends to events.jsonl, synced, and to the log."""

    text: str
    failure: Failure | None = None
    """The driver adds stacks and the last output."""
    gives_up: str = ""
    """Why the failure ends the run; empty where it is recovered from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiesce:
    """Waits for the replies of the lost step from the pools that stay, for at most quiesce_s, and
    ends the calls that were not started."""

    lost: tuple[str, ...]
    """Pools that are not waited for."""
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuild:
    """Kills these pools, waits until their processes are gone and their devices' memory is free,
    places and starts them anew. With no pools it only looks at what memory still holds."""

    pools: tuple[str, ...]
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """Loads a commit into every trained role that does not hold it, after its digests were
    verified. Step -1 of Place.start: the weights with which a run starts."""

    step: int
    place: Place
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconnect:
    """Joins pools that exchange weights, and forces an attested weight sync, before any sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewind:
    """Sets data, streams, algorithm, ledger, and trackers to the restored commit: what is later is
    cut, a line of it that is missing is written. -1: to the start. Checks the fence first; puts
    new files in the place of the old ones, so that an attempt that passed its own check a moment
    ago writes into files that nobody reads."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Ends the controller with this status and, unless it was fenced, its report."""

    code: Exit
    reason: str = ""


Action = (
    RunStep
    | Stage
    | Record
    | Export
    | Flush
    | Commit
    | Prune
    | SetAside
    | Report
    | Quiesce
    | Rebuild
    | Restore
    | Reconnect
    | Rewind
    | Stop
)
