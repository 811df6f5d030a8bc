"""Driver: the loop of a run. hybridflow/recovery/machine.py decides, the driver carries out.

    outcome = Driver(loop, pools=pools, rejoin=rejoin, config=config.recovery, events=events).run()

A step is RunStep, Stage, Record, Prune and RunStep again. After a failure: it is written to
events.jsonl; the calls of the other pools end; the failed pools are killed, seen to be gone, placed
and built anew; every trained role loads the newest commit; pools that exchange weights join anew,
and the next generation begins with a sync that is attested and probed; data, streams, algorithm and
metrics go back to the commit; the lost step is replayed.

The death of the controller itself is a supervisor's business (hybridflow/supervisor.py). A run in
one process (runtime=local) has no pool that could be restarted.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from controllers.flushes import Flushes
from controllers.ledger import Line, line_difference, line_digest, read_ledger
from controllers.loop import Loop, Outcome
from controllers.not_finite import StepGivenUp
from controllers.outcome import nothing_to_do
from controllers.saving import DISK, MEMORY, ONE_NODE, Commit, Nodes, steps_of
from hybridflow.errors import TooFewDevices
from hybridflow.failures import RECOVERABLE, EventLog, describe, failed_pools
from hybridflow.host_watch import HostWatch
from hybridflow.metrics.vitals import Vitals
from hybridflow.pool import ResourcePool, take_turns
from hybridflow.progress import activity
from hybridflow.recovery import actions as do
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action, Exit
from hybridflow.recovery.attempts import Fenced
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.recovery.events import Event, Place
from hybridflow.recovery.machine import decide
from hybridflow.recovery.state import Phase, Policy, begin
from hybridflow.snapshots.reading import FilesMissing
from hybridflow.supervision import SUPERVISION
from hybridflow.waiting import CALLS

LOGGER = logging.getLogger(__name__)
TICK_S = 1.0
COPYING_TICK_S = 0.02
LEAVE_S = 30.0
"""How long a controller that has to leave tries to write its newest snapshot to disk."""
RESTARTS_NOTHING = RecoveryConfig(max_restarts=0)
PHASES: dict[type, str] = {
    do.Quiesce: "quiesce_s",
    do.Rebuild: "rebuild_s",
    do.Restore: "restore_s",
}
"""Names of a recovery's parts in events.jsonl."""


def alone(restarted: set[str]) -> None:
    """Pools that exchange no weights."""


class Driver:
    """See above. `rejoin` brings pools that exchange weights together again; it is given the names
    of the pools that were restarted."""

    def __init__(
        self,
        loop: Loop,
        *,
        pools: Mapping[str, ResourcePool] | None = None,
        rejoin: Callable[[set[str]], None] = alone,
        config: RecoveryConfig = RESTARTS_NOTHING,
        events: EventLog | None = None,
        restarts: int = 0,
        furthest: int = -1,
        deterministic: bool = False,
        nodes: Nodes = ONE_NODE,
    ) -> None:
        """`restarts`: without progress so far, of this run's earlier controllers; `furthest`: the
        highest step that they committed. `deterministic`: whether a step that is trained again must
        leave the same bits. `nodes`: those that hold the snapshots. Without `events` nothing is
        written down."""
        self.loop, self.saving = loop, loop.saving
        self.pools = pools or {}
        self.config, self.events = config, events
        self.deterministic = deterministic
        self.saving.nodes = nodes
        self._restarts, self._furthest = restarts, furthest
        self._rejoin = rejoin
        self.state = begin(self._policy())
        self._inbox: deque[Event] = deque()
        self._flushes = Flushes(loop, self._inbox)
        self._stop: do.Stop | None = None
        self._error: Exception | None = None
        """The failure that is being recovered from, and its evidence."""
        self._evidence = ""
        self._lines: dict[int, Line] = {}
        """The ledger's lines of all timelines, by step."""
        self._restored: Commit | None = None
        self._restarted: set[str] = set()
        """Pools that were built anew and have not joined the others yet."""
        self._seconds: dict[str, float] = {}
        self._interrupted_at = 0
        self._interrupted_s = 0.0
        """When, in Unix seconds."""
        self.vitals = Vitals()
        self.hosts = HostWatch(self.pools, None if events is None else events.path.parent)
        for event in () if events is None else events.read():
            self.vitals.count(event)

    # The loop.

    def run(self) -> Outcome:
        """To the end of the run. Raises the last failure where it is not to be recovered from,
        SystemExit with a status of Exit where this controller has to leave, a RuntimeError where
        going on would be wrong."""
        self._put(self._started())
        SUPERVISION.on_leave = self.leave
        CALLS.leaving = self.saving.nodes.leaving
        self._drive()
        assert self._stop is not None
        if self._stop.code is Exit.done:
            self.saving.clear()  # the last step is on disk
            return self.loop.outcome()
        SUPERVISION.mark_final()
        if self._stop.code is Exit.fenced:
            self.saving.check_fence()
        if self._error is not None and self._stop.code in (Exit.gave_up, Exit.user_error):
            raise self._error
        if self._stop.code is Exit.gave_up:
            raise RuntimeError(self._stop.reason)
        LOGGER.error("%s", self._stop.reason)
        raise SystemExit(int(self._stop.code))

    def leave(self) -> None:
        """Writes the newest snapshot to disk, at once, whatever this process is doing. The run is
        over after it. For a signal's handler."""
        self._inbox.clear()
        self.saving.store.settle()  # the notice may have come in the middle of a commit
        timeline = self.saving.timeline()
        notice = on.Draining(
            deadline=time.monotonic() + LEAVE_S,
            notice="SIGTERM",
            staged=steps_of(timeline, MEMORY),
            durable=steps_of(timeline, DISK),
        )
        self._put(notice)
        self._drive()

    def _drive(self) -> None:
        while self.state.phase is not Phase.stopped:
            event = self._inbox.popleft() if self._inbox else self._wait()
            try:
                for action in self._decide(event):
                    self._carry_out(action)
            except RECOVERABLE as error:
                self._failed(error)
            except StepGivenUp as error:
                self._step_given_up(error)
            except Fenced:
                self._put(on.Fenced())

    def _decide(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = decide(self.state, event, time.monotonic())
        self._flushes.under_way = self.state.flush
        if not isinstance(event, on.Fenced):  # after it nothing is written
            if self.events is not None:
                self.events.flush()
            self._note()
        return actions

    def _carry_out(self, action: Action) -> None:
        started = time.monotonic()
        match action:
            case do.RunStep():
                self._run_step(action)
            case do.Stage():
                self._stage(action)
            case do.Record():
                self.loop.record()
            case do.Export():
                self._flushes.export(action.step)
            case do.Flush():
                leaving = self.state.phase is Phase.leaving
                self._flushes.begin(action.step, without_roles=leaving)
            case do.Commit():
                self._flushes.commit(action.step, action.number)
            case do.Prune():
                self._prune(action)
            case do.SetAside():
                self._set_aside(action)
            case do.Report():
                self._report(action)
            case do.Quiesce():
                self._quiesce(action)
            case do.Rebuild():
                self._rebuild(action)
            case do.Restore():
                self._restore(action)
            case do.Reconnect():
                self._rejoin(self._restarted)
            case do.Rewind():
                self._rewind(action)
            case do.Stop():
                self._stop = action
        name = PHASES.get(type(action))
        if name is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started

    def _put(self, event: Event) -> None:
        self._inbox.append(event)

    def _wait(self) -> Event:
        """The next event where no action has put one: of the flush under way, or a Tick."""
        self._flushes.look()
        if self._inbox:
            return self._inbox.popleft()
        time.sleep(TICK_S if self.state.flush is None else COPYING_TICK_S)
        return on.Tick()

    # A step and its commits.

    def _policy(self) -> Policy:
        loop, config = self.loop.config, self.config
        return Policy(
            max_restarts=config.max_restarts,
            snapshot_every=0 if self.saving.memory is None else self.loop.snapshot_every,
            flush_every=loop.checkpoint_every,
            flush_seconds=60.0 * loop.checkpoint_minutes,
            export_every=loop.export_every,
            disk_grace_s=config.disk_grace_s,
            deterministic=self.deterministic,
        )

    def _started(self) -> Event:
        loop, timeline = self.loop, self.saving.timeline()
        for line in read_ledger(loop.ledger.path):
            self._lines[line["step"]] = line
        self._write("started", step=loop.step, pid=os.getpid(), pids=self._pids())
        LOGGER.info("%s", loop.length)
        lacking = [commit for commit in timeline if not commit.has_model]
        without_model = steps_of(lacking, DISK)
        if loop.ends and loop.step not in without_model:
            LOGGER.info("%s", nothing_to_do(loop.store.directory.parent, loop.step))
        return on.Started(
            pools=tuple(self.pools),
            held=-1 if loop.step == 0 and not timeline else loop.step,
            last=loop.ends,
            staged=steps_of(timeline, MEMORY),
            durable=steps_of(timeline, DISK),
            without_model=without_model,
            digests={step: line_digest(line) for step, line in self._lines.items()},
            restarts=self._restarts,
            furthest=self._furthest,
        )

    def _run_step(self, action: do.RunStep) -> None:
        while self._inbox:  # what the disk has answered is committed before the long wait
            for further in self._decide(self._inbox.popleft()):
                self._carry_out(further)
        self.loop.run_step(action.step)
        self.hosts.look(action.step)
        self._flushes.look()
        self._put(on.Tick())
        self._put(
            on.StepDone(
                step=action.step,
                incarnation=action.incarnation,
                last=self.loop.ends,
                best=self.loop.is_best,
            )
        )

    def _stage(self, action: do.Stage) -> None:
        line = self.loop.stage()
        lost, difference = self._lines.get(action.step), ""
        if lost is not None:
            difference = line_difference(lost, line, self.loop.ledger.names)
        digest = line_digest(line)
        if difference and lost is not None and digest != line_digest(lost):
            self._write("replay_differs", step=action.step, lost=lost, replayed=line)
        self._lines[action.step] = line
        self._put(
            on.Staged(
                step=action.step,
                incarnation=action.incarnation,
                digest=digest,
                difference=difference,
            )
        )

    def _prune(self, action: do.Prune) -> None:
        """The disk is pruned by the commit."""
        if action.place is Place.memory:
            self.saving.prune_memory(action.protected)
        else:
            self._put(on.Pruned(durable=steps_of(self.saving.timeline(), DISK)))

    def _write(self, event: str, **fields: Any) -> None:
        """Into events.jsonl, and what is counted of it. Raises Fenced where the run is another
        controller's by now."""
        if self.events is not None:
            self.saving.check_fence()
            self.vitals.count(self.events.write(event, **fields))

    def _note(self) -> None:
        """Tells the supervisor what the next controller builds on, and the trackers where the run
        stands."""
        budget = self.state.budget
        self.vitals.values |= {
            "step": float(self.loop.step),
            "staged_step": float(max(self.state.staged, default=-1)),
            "durable_step": float(max(self.state.durable, default=-1)),
            "restarts_without_progress": float(budget.restarts),
        }
        self.loop.tracker.watch(self.vitals.values | self.hosts.values)
        if (budget.restarts, budget.furthest) != (self._restarts, self._furthest):
            self._restarts, self._furthest = budget.restarts, budget.furthest
            SUPERVISION.note(furthest=budget.furthest, restarts=budget.restarts)

    # A failure.

    def _failed(self, error: Exception) -> None:
        if self._error is None:
            self._interrupted_at, self._interrupted_s = self.loop.step + 1, time.time()
            self._seconds = {"since": time.monotonic()}
        failure, self._evidence = describe(error, self.loop.step + 1)
        self._error = error
        broken = {name for name, pool in self.pools.items() if pool.broken}
        lost = (failed_pools(error) & set(self.pools)) | broken
        if not lost:
            LOGGER.warning("no further restart: no pool of processes can be restarted for it")
            SUPERVISION.mark_final()
            raise error
        self._put(on.Failed(failure=failure, incarnation=self.state.incarnation))

    def _step_given_up(self, error: StepGivenUp) -> None:
        self._interrupted_at, self._interrupted_s = error.step, time.time()
        self._seconds = {"since": time.monotonic()}
        self._write("not_finite", step=error.step, roles=error.roles, uids=error.uids)
        self._put(on.NotFinite(step=error.step, incarnation=self.state.incarnation))

    def _report(self, action: do.Report) -> None:
        failure = action.failure
        if failure is None:
            LOGGER.warning("%s", action.text)
            return
        record = asdict(failure)
        self._write("failure", **record, evidence=self._evidence, gives_up=action.gives_up)
        self.loop.tracker.trace_failure(f"{failure.role} {failure.kind}", record)
        if action.gives_up:
            LOGGER.warning("no further restart: %s", action.gives_up)
            return
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

    def _quiesce(self, action: do.Quiesce) -> None:
        CALLS.quiesce(self.config.quiesce_s)
        silent = {name for name, pool in self.pools.items() if pool.broken}
        if self._error is not None:
            silent |= failed_pools(self._error) & set(self.pools)
        others = tuple(sorted(silent - set(action.lost)))
        self._put(on.Quiesced(incarnation=action.incarnation, silent=others))

    def _rebuild(self, action: do.Rebuild) -> None:
        if self.state.flush is not None:  # its copies end with the processes
            self._flushes.fail("the run goes back while it is written")
        with activity("recovery", detail=CALLS.under_way):
            self._restarted.update(action.pools)
            try:
                take_turns([self.pools[name].restarting() for name in action.pools])
            except TooFewDevices as error:
                LOGGER.error("%s", error)
                self._put(on.TooFewDevices(incarnation=action.incarnation))
                return
        staged = steps_of(self.saving.timeline(), MEMORY)
        self._put(on.Rebuilt(incarnation=action.incarnation, staged=staged))

    def _restore(self, action: do.Restore) -> None:
        commit = None
        with activity("recovery", detail=CALLS.under_way):
            if action.place is not Place.start:
                commit = self.saving.commit_of(action.step, action.place)
                try:
                    if commit is None:
                        raise FileNotFoundError("its files are gone")
                    commit = self.saving.verified(commit)
                except (OSError, ValueError) as error:
                    lost = commit is None or isinstance(error, FilesMissing)
                    self._put(
                        on.RestoreFailed(
                            step=action.step,
                            place=action.place,
                            incarnation=action.incarnation,
                            damaged=not (lost and action.place is Place.memory),
                            lost=lost,
                            cause=str(error),
                        )
                    )
                    return
            self.loop.go_to(commit)
        self._restored = commit
        self._put(
            on.Restored(step=action.step, incarnation=action.incarnation, last=self.loop.ends)
        )

    def _rewind(self, action: do.Rewind) -> None:
        loop, restored = self.loop, self._restored
        for line in read_ledger(loop.ledger.path):
            self._lines[line["step"]] = line
        loop.rewind(restored)
        self.saving.free_later(loop.step)
        loop.tracker.rewind(loop.step, 0 if self.events is None else self.events.attempt)
        records = CALLS.finish()
        seconds = time.monotonic() - self._seconds.pop("since")
        pools, self._restarted = sorted(self._restarted), set()
        failed, self._error = self._error is not None, None
        place = Place.start if restored is None else restored.place
        LOGGER.warning(
            "%s in %.1f s: pools restarted: %s; everything is as after step %d (%s)",
            "recovered" if failed else "rewound",
            seconds,
            ", ".join(pools) or "none",
            loop.step,
            place,
        )
        loop.tracker.trace(records, "recovery" if failed else "rewind", self._interrupted_s)
        self._write(
            "recovered" if failed else "rewound",
            step=loop.step,
            source=place,
            lost_steps=self._interrupted_at - loop.step,
            pools=pools,
            pids=self._pids(),
            total_s=seconds,
            **self._seconds,
        )

    def _set_aside(self, action: do.SetAside) -> None:
        commit = self.saving.commit_of(action.step, action.place)
        if commit is not None:
            self.saving.set_aside(commit)

    def _pids(self) -> dict[str, list[int]]:
        return {name: pool.pids() for name, pool in self.pools.items()}
