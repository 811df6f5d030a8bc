"""RecoveryConfig: what a run keeps for the case that something dies, and what it then does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class RecoveryConfig:
    """recovery.snapshot_every=1 recovery.max_restarts=3"""

    snapshot_every: int = 1
    """Steps between snapshots into the nodes' memory (/dev/shm), from which a run goes on after a
    failure; 0: none, a run goes on from its latest checkpoint on disk."""
    copies: int = 2
    """Nodes that hold a snapshot in memory where there are several: 2 has every node's part copied to
    another one as well, from which a run goes on after the loss of a node; 1: only the own one."""
    max_restarts: int = 3
    """Restarts without a newly committed step between them, after which the run ends with the
    report of the last failure; 0: the first failure ends it."""
    quiesce_s: float = 60.0
    """How long the calls of the other pools may go on after a failure; a pool that has not ended
    them by then is restarted too."""
    disk_grace_s: float = 600.0
    """How long checkpoints may fail, or one may take, before the run ends: a full or slow disk. The
    run goes on in memory meanwhile."""

    def __post_init__(self) -> None:
        if self.copies not in (1, 2):
            raise ValueError(f"recovery.copies is {self.copies}; use 1 or 2")
        for name, value in (
            ("snapshot_every", self.snapshot_every),
            ("max_restarts", self.max_restarts),
            ("quiesce_s", self.quiesce_s),
            ("disk_grace_s", self.disk_grace_s),
        ):
            if value < 0:
                raise ValueError(f"recovery.{name} is {value}; use 0 or more")
