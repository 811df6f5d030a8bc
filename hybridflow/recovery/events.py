"""Events: everything that recovery decides upon. Small, frozen, plain data.

An action carries the number of the incarnation that it belongs to, and its answer brings the number
back: an answer that arrives after the pools were rebuilt is about a world that is gone, and is
ignored. A failure carries the incarnation of its pool's processes for the same reason, so that a
death that is reported twice, or late, does not cost a second recovery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """The class of a failure, which decides whether it may be tried again."""

    died = "died"
    """A process ended: a signal, an exit, the kernel's out-of-memory killer."""
    hung = "hung"
    """A call passed its deadline."""
    raised = "raised"
    """A worker or a reward raised; the state of its process is unknown."""
    node_lost = "node_lost"
    """A machine left, with its processes and what it held in memory."""
    user_error = "user_error"
    """A ValueError, or a gradient that is not finite: the same again would fail again. Never
    retried."""


class Place(StrEnum):
    """Where a commit's files are."""

    start = "start"
    """Nowhere: the state in which a run starts, before step 0; the step is -1."""
    memory = "memory"
    """Outlives processes, not the node."""
    disk = "disk"
    """Outlives everything once it is committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One failure, as events.jsonl and the report name it.

    Failure(kind=Kind.died, pool="policy", role="actor", rank=1, method="update_actor",
            cause="SIGKILL", step=12)
    """

    kind: Kind
    pool: str = ""
    """Empty where no pool is to blame: a reward task, the algorithm's code."""
    role: str = ""
    rank: int | None = None
    method: str = ""
    cause: str = ""
    """One line without addresses, times, or process ids: two failures are the same if it is."""
    step: int = 0
    """The step that was under way."""

    def same_as(self, other: Failure | None) -> bool:
        """Whether both are the same exception at the same place. A killed process proves nothing
        about the next one, so deaths and hangs are left to the budget."""
        return self.kind is Kind.raised and self == other


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The first event of a controller: it holds the newest attempt number."""

    pools: tuple[str, ...]
    """All pools; starting them is the same action as rebuilding them."""
    held: int | None = None
    """The step whose state the roles hold already, -1: that of the start, where whoever sends this
    has started the pools and restored them; None: no pool is up."""
    last: bool = False
    """Whether the run ends with `held`."""
    staged: tuple[int, ...] = ()
    """Steps of the commits that can be read from memory, oldest first."""
    durable: tuple[int, ...] = ()
    """Steps of the commits on disk, oldest first."""
    without_model: tuple[int, ...] = ()
    """Those of them that hold no Hugging Face directory."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """The ledger's digest by step, lost steps included: a replayed step is held against it. Only
    of lines whose own checksum is right: a line that was not synced may hold a wrong bit."""
    restarts: int = 0
    """Restarts without progress so far, by this controller's predecessors."""
    furthest: int = -1
    """The highest step that any of them committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """All calls of RunStep, and its validation if one was due, have ended."""

    step: int
    incarnation: int
    last: bool = False
    """Whether the run ends here: its steps or epochs are done, or its reward is good enough."""
    best: bool = False
    """Whether its validation is the best so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """The gradient of a step is not finite, and on_nonfinite=rewind: no process has failed, but
    everything goes back to the newest commit, and the driver passes over the step's rows."""

    step: int
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """Stage ended: every rank's files and the controller's record of the step are committed in
    memory."""

    step: int
    incarnation: int
    digest: str = ""
    """All trained weights and optimizer states, independent of the layout; empty: unknown."""
    difference: str = ""
    """In words: where the step differs from the same step of a lost timeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flushed:
    """Every file of a flush is on disk and synced; its commit is still missing."""

    step: int
    number: int
    """That of the Flush action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlushFailed:
    """A flush or its commit met a full, broken, or slow disk; nothing of it will be read."""

    step: int
    number: int
    cause: str = ""
    lost: bool = False
    """Its files in memory are gone or damaged: the disk is not to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFailed:
    """An export met a full or broken disk; nothing of it is left."""

    step: int
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """Commit ended: the step is durable."""

    step: int
    number: int
    without_model: bool = False
    """Whether it holds no Hugging Face directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """Prune of the disk ended."""

    durable: tuple[int, ...]
    """Steps of the commits that are left there, oldest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Something died, hung, or raised; the calls and actions under way are lost."""

    failure: Failure
    incarnation: int
    """When the pool's processes were started; for a failure without a pool, the current one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiesced:
    """Quiesce ended: no call of the lost step is running in any pool that stays."""

    incarnation: int
    silent: tuple[str, ...] = ()
    """Pools that died meanwhile or did not answer in time (blocked beside a dead peer): they are
    rebuilt too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Rebuild ended: the pools are up."""

    incarnation: int
    staged: tuple[int, ...] = ()
    """Commits whose files are all still in memory, on the nodes that are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TooFewDevices:
    """Rebuild waited for devices and did not get enough for this layout."""

    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """Restore ended: every trained role holds the state after this step; -1: that of the start."""

    step: int
    incarnation: int
    last: bool = False
    """As StepDone's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreFailed:
    """A commit could not be loaded, and no pool is to blame."""

    step: int
    place: Place
    incarnation: int
    damaged: bool = False
    """Its digests say so: it is not tried again."""
    lost: bool = False
    """Its files are gone, with their node: there is nothing to try, or to repair."""
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draining:
    """A notice that this job, or a node of it, ends soon: SIGTERM, or Ray's drain."""

    deadline: float
    """On the clock of `now`."""
    notice: str = ""
    staged: tuple[int, ...] | None = None
    """Steps of the commits that can be read from memory, oldest first: a notice in the middle of
    Stage comes before Staged, but perhaps after the commit. None: those that are known."""
    durable: tuple[int, ...] | None = None
    """Steps of the commits on disk: a notice may come between a commit and its Committed. As
    `staged`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """A newer attempt has started: what this one would write now belongs to nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passed; sent about once a second while anything is waited for."""


Event = (
    Started
    | StepDone
    | NotFinite
    | Staged
    | Flushed
    | FlushFailed
    | ExportFailed
    | Committed
    | Pruned
    | Failed
    | Quiesced
    | Rebuilt
    | TooFewDevices
    | Restored
    | RestoreFailed
    | Draining
    | Fenced
    | Tick
)
