"""Recovery: what dies is killed whole, rebuilt, restored and replayed, while the loop's objects stay
the objects that they are.

    recovery = Recovery(pools, rejoin, config.recovery, tracker, EventLog(directory))
    outcome = recovery.run(loop)        # Loop.run(), started again after each failure

After a failure: it is written to events.jsonl; the calls of the other pools end; the failed pools
are killed, seen to be gone, placed and built anew; every trained role loads the newest commit; pools
that exchange weights join anew, and the next generation begins with a sync that is attested and
probed; data, streams, algorithm and metrics go back to the commit; the lost step is replayed. How
often is decided by the budget (hybridflow/recovery/budget.py).

The death of the controller itself is a supervisor's business (hybridflow/supervisor.py). A run in
one process (runtime=local) has no pool that could be restarted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise

from controllers.ledger import Line, read_ledger
from controllers.loop import Loop, Outcome
from hybridflow.failures import RECOVERABLE, EventLog, describe, failed_pools
from hybridflow.metrics import Tracker
from hybridflow.pool import ResourcePool
from hybridflow.progress import activity
from hybridflow.recovery.budget import Budget
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.supervision import SUPERVISION
from hybridflow.waiting import CALLS

LOGGER = logging.getLogger(__name__)


class Recovery:
    """See above. `rejoin` brings pools that exchange weights together again; it is given the names
    of the pools that were restarted."""

    def __init__(
        self,
        pools: Mapping[str, ResourcePool],
        rejoin: Callable[[set[str]], None],
        config: RecoveryConfig,
        tracker: Tracker,
        events: EventLog,
        *,
        restarts: int = 0,
        furthest: int = -1,
    ) -> None:
        """`restarts`: without progress so far, of this run's earlier controllers; `furthest`: the
        highest step that they committed."""
        self.pools = pools
        self.config = config
        self.tracker = tracker
        self.events = events
        self.budget = Budget(max_restarts=config.max_restarts, restarts=restarts, furthest=furthest)
        self._rejoin = rejoin
        self._lost_lines: dict[int, Line] = {}
        """The ledger's lines of committed steps that a recovery took back."""

    def committed(self, loop: Loop, step: int) -> None:
        """The step is committed: restarts before it do not count any more."""
        self.budget = self.budget.progressed(step)
        SUPERVISION.note(furthest=step, restarts=self.budget.restarts)
        lost, line = self._lost_lines.pop(step, None), loop.ledger.last
        if lost is None or line is None:
            return
        differing = [name for name in ("rows", "roles") if lost[name] != line[name]]
        if differing:
            self.events.write("replay_differs", step=step, lost=lost, replayed=line)
            LOGGER.warning(
                "step %d was trained again and its %s differ from those of the lost timeline; both "
                "lines of the ledger are in events.jsonl",
                step,
                " and ".join(differing),
            )

    def run(self, loop: Loop) -> Outcome:
        """Loop.run() to its end. Raises the last failure where the budget does not allow another
        restart."""
        loop.committed = partial(self.committed, loop)
        if self.config.max_restarts:
            self.events.write("started", step=loop.step, pid=os.getpid(), pids=self._pids())
        while True:
            try:
                return loop.run()
            except RECOVERABLE as error:
                self._admit(loop, error)
                self._recover(loop, error)

    def _admit(self, loop: Loop, error: Exception) -> None:
        """Writes the failure down. Raises it where it is not to be retried."""
        failure, evidence = describe(error, loop.step + 1)
        if self.config.max_restarts == 0:
            raise error
        self.budget, refusal = self.budget.spend(failure)
        SUPERVISION.note(restarts=self.budget.restarts)
        self.events.write("failure", **asdict(failure), evidence=evidence, gives_up=refusal)
        if not refusal and not self._lost_pools(error):
            refusal = "no pool of processes can be restarted for it"
        if refusal:
            LOGGER.warning("no further restart: %s", refusal)
            SUPERVISION.mark_final()
            raise error
        LOGGER.warning(
            "%s rank %s of pool %s %s in %s, step %d: %s",
            failure.role,
            failure.rank,
            failure.pool,
            failure.kind,
            failure.method,
            failure.step,
            failure.cause,
        )

    def _recover(self, loop: Loop, error: Exception) -> None:
        """Returns when the loop can go on. A further failure meanwhile starts it over."""
        lost = self._lost_pools(error)
        started, interrupted_at = time.monotonic(), loop.step + 1
        while True:
            try:
                with activity("recovery", detail=CALLS.under_way):
                    seconds = self._rebuild(loop, lost)
                break
            except RECOVERABLE as further:
                self._admit(loop, further)
                lost |= self._lost_pools(further)
        CALLS.finish()
        self.events.write(
            "recovered",
            step=loop.step,
            lost_steps=interrupted_at - loop.step,
            pools=sorted(lost),
            pids=self._pids(),
            total_s=time.monotonic() - started,
            **seconds,
        )
        LOGGER.warning(
            "recovered in %.1f s: pools %s were restarted, step %d is next",
            time.monotonic() - started,
            ", ".join(sorted(lost)),
            loop.step + 1,
        )

    def _rebuild(self, loop: Loop, lost: set[str]) -> dict[str, float]:
        """The seconds of each part. Adds to `lost` the pools that have to be rebuilt as well."""
        times = [time.monotonic()]
        CALLS.quiesce(self.config.quiesce_s)
        lost |= self._broken_pools()
        if loop.starts_from_scratch:  # nothing else holds the weights that the run began with
            lost |= set(self.pools)
        times.append(time.monotonic())
        for name, pool in self.pools.items():
            if name in lost:
                pool.restart()
        times.append(time.monotonic())
        lines = read_ledger(loop.ledger.path)
        loop.restore()
        for line in lines:
            if line["step"] > loop.step:
                self._lost_lines[line["step"]] = line
        self._rejoin(lost)
        times.append(time.monotonic())
        self.tracker.rewind(loop.step, self.events.attempt)
        quiesce, rebuild, restore = (end - begin for begin, end in pairwise(times))
        return {"quiesce_s": quiesce, "rebuild_s": rebuild, "restore_s": restore}

    def _lost_pools(self, error: Exception) -> set[str]:
        return (failed_pools(error) & set(self.pools)) | self._broken_pools()

    def _pids(self) -> dict[str, list[int]]:
        return {name: pool.pids() for name, pool in self.pools.items()}

    def _broken_pools(self) -> set[str]:
        return {name for name, pool in self.pools.items() if pool.broken}
