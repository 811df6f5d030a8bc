"""decide(state, event, now) -> (state, actions): recovery's whole policy, as a pure function.

    kill, rebuild, restore, replay: no communicator is repaired, no call is run twice

A step is staged to memory after it ended, recorded, and flushed to disk where that is due, while
the next one runs. Whatever fails, everything goes back to the newest commit that can be read, and
the lost steps are replayed. The driver is a loop:

    state = begin(policy)
    events.put(Started(pools, commits))         # starting is recovering: rebuild, restore, run
    while state.phase is not Phase.stopped:
        state, actions = decide(state, events.get(), now())
        for action in actions:                  # in order; one that fails puts Failed, and ends it
            carry_out(action)                   # RunStep: loop.run_step(7)

That of a real run is controllers/recovery.py. Its wait takes Flushed and FlushFailed once a step;
Draining ends a step at once. Without failures the actions of a step are RunStep, Stage, Record,
Prune, and now and then Export, Flush and Commit.

Left out: noticing failures and deadlines of calls, retries of a reward, which rows are passed over.
"""

from __future__ import annotations

from dataclasses import replace

from hybridflow.recovery import actions as do
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action, Exit
from hybridflow.recovery.events import Event, Place
from hybridflow.recovery.state import FlushUnderWay, Phase, State

Decision = tuple[State, tuple[Action, ...]]


def decide(state: State, event: Event, now: float) -> Decision:
    """The next state and what to do, after `event` at `now` (seconds on any clock that grows)."""
    if state.phase is Phase.stopped:
        return state, ()
    match event:
        case on.Fenced():
            return _stop(state, Exit.fenced, "a newer attempt of this run has started")
        case on.Started():
            return _started(state, event, now)
        case on.Draining():
            return _leave(state, event, now)
        case on.Tick():
            return _tick(state, now)
        case on.Flushed() | on.FlushFailed() | on.Committed():
            if state.flush is None or event.number != state.flush.number:
                return state, ()  # of a flush that was given up
            return _disk(state, event, now)
        case on.ExportFailed():
            return _export_failed(state, event, now)
        case on.Pruned():
            return replace(state, durable=event.durable), ()
        case on.Failed():
            return _failed(state, event)
    if event.incarnation != state.incarnation or state.phase is Phase.leaving:
        return state, ()  # late: the world that it speaks of is gone
    match event:
        case on.StepDone():
            return _step_done(state, event, now)
        case on.NotFinite() if state.phase is Phase.stepping and event.step == state.step:
            return _quiesce(state, state.lost)
        case on.Staged():
            return _staged(state, event, now)
        case on.Quiesced():
            return _rebuild(state, event.silent)
        case on.Rebuilt() if state.phase is Phase.rebuilding:
            readable = tuple(step for step in state.staged if step in event.staged)
            return _restore(replace(state, staged=readable, lost=()))
        case on.TooFewDevices() if state.phase is Phase.rebuilding:
            return _stop(state, Exit.other_layout, "too few devices are left for this layout")
        case on.RestoreFailed():
            return _restore_failed(state, event)
        case on.Restored():
            return _restored(state, event, now)
    return state, ()


# A run without failures: step, stage, record, flush while the next step runs.


def _started(state: State, event: on.Started, now: float) -> Decision:
    budget = replace(state.budget, restarts=event.restarts, furthest=event.furthest)
    for step in (*event.staged, *event.durable):
        budget = replace(budget, furthest=max(step, budget.furthest))
    state = replace(
        state,
        budget=budget,
        staged=event.staged,
        durable=event.durable,
        without_model=frozenset(event.without_model),
        digests=event.digests,
        flushed_at=now,
        pools=event.pools,
    )
    if event.held is not None:
        return _go_on(state, event.held, last=event.last, now=now)
    state = replace(state, lost=event.pools)
    rebuild = do.Rebuild(pools=event.pools, incarnation=state.incarnation)
    return replace(state, phase=Phase.rebuilding), (rebuild,)


def _run(state: State, step: int) -> Decision:
    state = replace(state, phase=Phase.stepping, step=step, last=False)
    return state, (do.RunStep(step=step, incarnation=state.incarnation),)


def _step_done(state: State, event: on.StepDone, now: float) -> Decision:
    if state.phase is not Phase.stepping or event.step != state.step:
        return state, ()
    state = replace(state, last=event.last)
    step = event.step
    actions: tuple[Action, ...] = ()
    flushed = _flush_is_due(state, now)
    exported = event.best or _divides(state.policy.export_every, step)
    if state.last or (flushed and exported and state.flush is None):
        actions = (do.Export(step=step),)  # before its commit: a replay exports it again
    if flushed or _divides(state.policy.snapshot_every, step):
        state = replace(state, phase=Phase.staging)
        return state, (*actions, do.Stage(step=step, incarnation=state.incarnation))
    state, more = _run(state, step + 1)
    return state, (*actions, do.Record(step=step), *more)


def _staged(state: State, event: on.Staged, now: float) -> Decision:
    if state.phase is not Phase.staging or event.step != state.step:
        return state, ()
    step = event.step
    earlier = state.digests.get(step, "")
    actions: list[Action] = []
    if earlier and event.digest and earlier != event.digest:
        text = f"step {step} was replayed and its digest differs: {earlier}, now {event.digest}"
        if event.difference:
            text += f"; first in {event.difference}"
        if state.policy.deterministic:
            return _stop(state, Exit.gave_up, text)
        actions.append(do.Report(text=text))
    state = replace(
        state,
        staged=(*(other for other in state.staged if other != step), step),
        digests={**state.digests, step: event.digest},
        budget=state.budget.progressed(step),
    )
    # Nothing that can be answered by Failed stands before Flush: its rest would be dropped.
    actions.append(do.Record(step=step))
    waits = state.last and state.not_exported == step
    if _flush_is_due(state, now) and not waits:
        state, more = _flush(state, now)
        actions.extend(more)
    state, more = _prune_memory(state)
    actions.extend(more)
    if state.last:
        return replace(state, phase=Phase.finishing), tuple(actions)
    state, more = _run(state, step + 1)
    return state, (*actions, *more)


def _flush_is_due(state: State, now: float) -> bool:
    seconds = state.policy.flush_seconds
    late = seconds > 0 and now - state.flushed_at >= seconds
    behind = state.disk_failing_since is not None
    due = late or behind or _divides(state.policy.flush_every, state.step)
    return state.last or (due and state.step > 0)  # before step 1 the start is as good


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _flush(state: State, now: float) -> Decision:
    """Flushes the newest snapshot. One flush at a time: while one is under way, the next is
    skipped, not queued; a later snapshot will be due again."""
    if state.flush is not None:
        text = f"step {state.staged[-1]} is not flushed: step {state.flush.step} still is"
        return state, (do.Report(text=text),)
    number = state.num_flushes + 1
    flush = FlushUnderWay(step=state.staged[-1], number=number, since=now)
    state = replace(state, flush=flush, num_flushes=number)
    return state, (do.Flush(step=flush.step, number=number),)


def _prune_memory(state: State) -> Decision:
    """Memory holds the newest snapshot, the one before, should that be damaged, and the one that is
    being flushed."""
    protected = set(state.staged[-2:])
    if state.flush is not None:
        protected.add(state.flush.step)
    staged = tuple(step for step in state.staged if step in protected)
    return replace(state, staged=staged), (do.Prune(place=Place.memory, protected=staged),)


def _disk(state: State, event: on.Flushed | on.FlushFailed | on.Committed, now: float) -> Decision:
    """The answer of the flush under way or of its commit."""
    match event:
        case on.Flushed():
            return state, (do.Commit(step=event.step, number=event.number),)
        case on.FlushFailed():
            return _flush_failed(state, event, now)
    durable = (*(step for step in state.durable if step != event.step), event.step)
    without_model, not_exported = state.without_model - {event.step}, state.not_exported
    if event.without_model:
        without_model |= {event.step}
        if state.phase is Phase.finishing and event.step == state.step:
            not_exported = event.step
    state = replace(
        state,
        flush=None,
        durable=durable,
        without_model=without_model,
        not_exported=not_exported,
        flushed_at=now,
        disk_failing_since=None,
        budget=state.budget.progressed(event.step),
    )
    prune = do.Prune(place=Place.disk, protected=(event.step,))  # after the commit, never before
    state, actions = _tick(state, now)
    return state, (prune, *actions)


def _flush_failed(state: State, event: on.FlushFailed, now: float) -> Decision:
    """The next snapshot, or the next Tick while the disk is waited for, tries again."""
    report = do.Report(text=f"step {event.step} could not be written to disk: {event.cause}")
    since = state.disk_failing_since
    if since is None:
        since = now
    state = replace(state, flush=None, disk_failing_since=since)
    if event.lost:
        staged = tuple(step for step in state.staged if step != event.step)
        state = replace(state, staged=staged)
    if state.phase is Phase.finishing and state.step not in state.staged:
        state = replace(state, phase=Phase.staging)  # the roles still hold it, or are rebuilt
        return state, (report, do.Stage(step=state.step, incarnation=state.incarnation))
    return state, (report,)


def _export_failed(state: State, event: on.ExportFailed, now: float) -> Decision:
    """The run goes on; a checkpoint of a step before the last is committed without it."""
    report = do.Report(text=f"step {event.step} could not be exported: {event.cause}")
    since = now if state.disk_failing_since is None else state.disk_failing_since
    state = replace(state, not_exported=event.step, disk_failing_since=since)
    return state, (report,)


def _tick(state: State, now: float) -> Decision:
    """Ends the phases that wait for the disk, or for a deadline."""
    if state.phase is Phase.leaving:
        if now >= state.deadline or set(state.staged[-1:]) <= set(state.durable):
            return _stop(state, Exit.preempted, "a notice ended this attempt")
        return _flush(state, now) if state.flush is None else (state, ())
    if state.phase is Phase.finishing and state.flush is None:
        if _is_complete(state, state.step):
            return _stop(state, Exit.done, "")
        given_up = _give_up_on_disk(state, now)
        if given_up is not None:
            return given_up
        if state.not_exported == state.step:  # the next Tick flushes it, or tries it again
            return replace(state, not_exported=None), (do.Export(step=state.step),)
        return _flush(state, now)
    return _give_up_on_disk(state, now) or (state, ())


def _is_complete(state: State, step: int) -> bool:
    """Whether the step is on disk with its model."""
    return step in state.durable and step not in state.without_model


def _give_up_on_disk(state: State, now: float) -> Decision | None:
    since = state.disk_failing_since
    if state.flush is not None:
        since = state.flush.since if since is None else since
    if since is None or now - since < state.policy.disk_grace_s:
        return None
    return _stop(
        state,
        Exit.gave_up,
        f"nothing could be written to disk for {now - since:.0f} s (recovery.disk_grace_s)",
    )


# A failure: quiesce, rebuild, restore, replay.


def _failed(state: State, event: on.Failed) -> Decision:
    failure = event.failure
    oldest = state.built.get(failure.pool, 0) if failure.pool else state.incarnation
    if state.phase is Phase.leaving or event.incarnation < oldest:
        return state, ()  # nothing is restarted any more; or the notice is late
    lost = state.lost
    if failure.pool and failure.pool not in lost:
        lost = (*lost, failure.pool)
    text = f"{failure.kind}: {failure.cause}"
    report = do.Report(text=text, failure=failure)
    if state.phase is Phase.quiescing and failure.kind is not on.Kind.user_error:
        # A peer of the first one, or a second failure that came as a consequence.
        return replace(state, lost=lost), (report,)
    budget, refusal = state.budget.spend(failure)
    if refusal:
        code = Exit.user_error if failure.kind is on.Kind.user_error else Exit.gave_up
        state, actions = _stop(state, code, refusal)
        return state, (replace(report, gives_up=refusal), *actions)
    if state.phase is Phase.restoring:
        state = _count_restore_failure(state)
    state, actions = _quiesce(replace(state, budget=budget), lost)
    return state, (report, *actions)


def _quiesce(state: State, lost: tuple[str, ...]) -> Decision:
    """The first action of going back, with pools to rebuild or without."""
    state = replace(state, phase=Phase.quiescing, lost=lost, incarnation=state.incarnation + 1)
    return state, (do.Quiesce(lost=lost, incarnation=state.incarnation),)


def _rebuild(state: State, silent: tuple[str, ...]) -> Decision:
    if state.phase is not Phase.quiescing:
        return state, ()
    return _build(state, (*state.lost, *(pool for pool in silent if pool not in state.lost)))


def _build(state: State, pools: tuple[str, ...]) -> Decision:
    built = {**state.built, **dict.fromkeys(pools, state.incarnation)}
    state = replace(state, phase=Phase.rebuilding, built=built, lost=pools)
    return state, (do.Rebuild(pools=pools, incarnation=state.incarnation),)


def _restore(state: State) -> Decision:
    """Restores the newest commit that can be read, from memory before disk; the start of the run
    where there is no commit, and none that a person could still repair."""
    commits = {(step, Place.disk) for step in state.durable}
    commits |= {(step, Place.memory) for step in state.staged}
    candidates = commits - state.damaged - state.avoided or commits - state.damaged
    if not candidates and state.damaged:
        return _stop(state, Exit.gave_up, "no commit of this run can be restored")
    commit = max(
        candidates,
        key=lambda candidate: (candidate[0], candidate[1] is Place.memory),
        default=(-1, Place.start),
    )
    step, place = commit
    stale = [pool for pool in state.pools if state.built.get(pool, 0) != state.incarnation]
    if place is Place.start and stale:  # only a pool that is built anew holds those weights
        return _build(state, tuple(stale))
    failures = state.restore_failures if commit == state.restoring else 0
    state = replace(state, phase=Phase.restoring, restoring=commit, restore_failures=failures)
    restore = do.Restore(step=step, place=place, incarnation=state.incarnation)
    if place is Place.start and state.budget.furthest >= 0:
        text = "every commit was lost with its node and none is on disk: from the start again"
        return state, (do.Report(text=text), restore)
    return state, (restore,)


def _count_restore_failure(state: State, *, damaged: bool = False) -> State:
    """A commit that is damaged, or that failed twice, is not tried again: the one before it is."""
    failures = state.restore_failures + 1
    if state.restoring[1] is Place.start or not (damaged or failures >= 2):
        return replace(state, restore_failures=failures)
    state = replace(state, restore_failures=0)
    if damaged:
        return replace(state, damaged=state.damaged | {state.restoring})
    return replace(state, avoided=state.avoided | {state.restoring})


def _restore_failed(state: State, event: on.RestoreFailed) -> Decision:
    if state.phase is not Phase.restoring:
        return state, ()
    text = f"step {event.step} could not be restored from {event.place}: {event.cause}"
    if event.lost and event.place is Place.memory:
        state = replace(state, staged=tuple(s for s in state.staged if s != event.step))
    else:
        state = _count_restore_failure(state, damaged=event.damaged)
    state, actions = _restore(state)
    return state, (do.Report(text=text), *actions)


def _restored(state: State, event: on.Restored, now: float) -> Decision:
    """Everything after the commit is given up, then the run goes on from it."""
    if state.phase is not Phase.restoring:
        return state, ()
    step = event.step
    aside = []
    unreadable = (state.damaged | state.avoided) - {state.restoring}
    for other, place in sorted(unreadable):
        aside.append(do.SetAside(step=other, place=place))
    flush = state.flush
    if flush is not None and flush.step > step:
        flush = None  # its files are of a timeline that is replayed
    readable = {
        Place.memory: _up_to(state.staged, step, unreadable, Place.memory),
        Place.disk: _up_to(state.durable, step, unreadable, Place.disk),
    }
    state = replace(
        state,
        step=step,
        last=event.last,
        staged=readable[Place.memory],
        durable=readable[Place.disk],
        damaged=frozenset(),
        avoided=frozenset(),
        restore_failures=0,
        flush=flush,
    )
    state, more = _go_on(state, step, last=event.last, now=now)
    return state, (*aside, do.Reconnect(), do.Rewind(step=step), *more)


def _go_on(state: State, step: int, *, last: bool, now: float) -> Decision:
    """From the state after `step`, which the roles hold."""
    if not last:
        return _run(state, step + 1)
    state = replace(state, phase=Phase.finishing, step=step, last=True)
    if _is_complete(state, step):
        return _tick(state, now)
    actions: tuple[Action, ...] = (do.Export(step=step),)
    if step in state.durable:
        text = f"step {step} is on disk without its model: it is exported and committed again"
        actions = (do.Report(text=text), *actions)
    if step in state.staged:
        return state, actions  # the next Tick flushes it
    stage = do.Stage(step=step, incarnation=state.incarnation)
    return replace(state, phase=Phase.staging), (*actions, stage)


def _up_to(
    steps: tuple[int, ...], step: int, unreadable: frozenset[tuple[int, Place]], place: Place
) -> tuple[int, ...]:
    return tuple(other for other in steps if other <= step and (other, place) not in unreadable)


# The end.


def _leave(state: State, event: on.Draining, now: float) -> Decision:
    """Leaves at once, with the last snapshot: no step is waited for, and no flush under way, whose
    processes may be busy or about to end. A second notice can only shorten the time."""
    deadline = event.deadline
    if state.phase is Phase.leaving:
        deadline = min(deadline, state.deadline)
    else:
        staged = state.staged if event.staged is None else event.staged
        durable = state.durable if event.durable is None else event.durable
        state = replace(state, flush=None, staged=staged, durable=durable)
    report = do.Report(text=f"{event.notice}: leaving within {deadline - now:.0f} s")
    state, actions = _tick(replace(state, phase=Phase.leaving, deadline=deadline), now)
    return state, (report, *actions)


def _stop(state: State, code: Exit, reason: str) -> Decision:
    return replace(state, phase=Phase.stopped), (do.Stop(code=code, reason=reason),)
