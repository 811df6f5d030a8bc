"""hybridflow.recovery.machine and budget, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybridflow.recovery import actions as do
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action, Exit
from hybridflow.recovery.budget import Budget, after_exit
from hybridflow.recovery.events import Event, Failure, Kind, Place
from hybridflow.recovery.machine import decide
from hybridflow.recovery.state import Phase, Policy, State, begin

DEATH = Failure(kind=Kind.died, pool="policy", role="actor", rank=1, cause="SIGKILL")


class Machine:
    """Feeds events and remembers the actions of the last one."""

    def __init__(self, **policy: Any) -> None:
        self.state: State = begin(Policy(**policy))
        self.actions: tuple[Action, ...] = ()
        self.now = 0.0

    def __call__(self, *events: Event) -> tuple[Action, ...]:
        for event in events:
            self.state, self.actions = decide(self.state, event, self.now)
        return self.actions

    def start(self, **commits: Any) -> None:
        self(on.Started(pools=("policy", "samples"), **commits))
        self(on.Rebuilt(incarnation=0, staged=commits.get("staged", ())))

    def restored(self, step: int) -> tuple[Action, ...]:
        return self(on.Restored(step=step, incarnation=self.state.incarnation))

    def step(self, step: int, *, last: bool = False, digest: str = "") -> tuple[Action, ...]:
        incarnation = self.state.incarnation
        self(on.StepDone(step=step, incarnation=incarnation, last=last))
        return self(on.Staged(step=step, incarnation=incarnation, digest=digest))

    def recover(self, failure: Failure = DEATH, staged: tuple[int, ...] = ()) -> None:
        """Up to the point where something is restored."""
        built = self.state.built.get(failure.pool, 0)
        self(on.Failed(failure=failure, incarnation=built if failure.pool else 999))
        incarnation = self.state.incarnation
        self(on.Quiesced(incarnation=incarnation))
        self(on.Rebuilt(incarnation=incarnation, staged=staged))


def running(**policy: Any) -> Machine:
    """A run whose step 0 is staged and whose step 1 is under way."""
    machine = Machine(**policy)
    machine.start()
    machine.restored(-1)
    machine.step(0)
    return machine


def kinds(actions: tuple[Action, ...]) -> list[type]:
    return [type(action) for action in actions]


def test_a_start_is_a_recovery_from_nothing() -> None:
    machine = Machine()
    machine.start()
    assert machine.actions == (do.Restore(step=-1, place=Place.start, incarnation=0),)
    assert machine.restored(-1) == (
        do.Reconnect(),
        do.Rewind(step=-1),
        do.RunStep(step=0, incarnation=0),
    )


def test_a_run_without_failures_is_the_loop() -> None:
    machine = Machine(flush_every=2)
    machine.start()
    machine.restored(-1)
    assert kinds(machine.step(1)) == []  # step 0 is under way
    assert kinds(machine.step(0)) == [do.Record, do.Prune, do.RunStep], "the start is as good"
    assert kinds(machine.step(1)) == [do.Record, do.Prune, do.RunStep]
    assert kinds(machine.step(2)) == [do.Record, do.Flush, do.Prune, do.RunStep]
    assert machine(on.Flushed(step=2, number=1)) == (do.Commit(step=2, number=1),)
    assert machine(on.Committed(step=2, number=1)) == (do.Prune(place=Place.disk, protected=(2,)),)
    machine.step(3, last=True)
    assert machine.state.phase is Phase.finishing
    machine(on.Flushed(step=3, number=2))
    actions = machine(on.Committed(step=3, number=2))
    assert actions[-1] == do.Stop(code=Exit.done)
    assert machine(on.Tick()) == ()


def test_flushes_are_skipped_not_queued_and_pruning_follows_a_commit() -> None:
    machine = running(flush_every=1)
    machine.step(1)
    for step in (2, 3, 4):
        actions = machine.step(step)
        assert kinds(actions) == [do.Record, do.Report, do.Prune, do.RunStep]
        held = tuple(sorted({1, step - 1, step}))
        assert actions[2] == do.Prune(place=Place.memory, protected=held)
    failed = machine(on.FlushFailed(step=1, number=1, cause="No space left on device"))
    assert kinds(failed) == [do.Report]
    assert do.Flush(step=5, number=2) in machine.step(5)
    assert machine(on.Flushed(step=1, number=1)) == ()  # of the flush that was given up
    machine.now = 599.0
    assert machine(on.Tick()) == ()
    machine.now = 600.0
    (stop,) = machine(on.Tick())
    assert isinstance(stop, do.Stop) and stop.code is Exit.gave_up
    assert "recovery.disk_grace_s" in stop.reason


def test_a_death_is_quiesce_rebuild_restore_replay() -> None:
    machine = running()
    actions = machine(on.Failed(failure=DEATH, incarnation=0))
    assert actions[1:] == (do.Quiesce(lost=("policy",), incarnation=1),)
    rebuild = machine(on.Quiesced(incarnation=1, silent=("samples",)))
    assert rebuild == (do.Rebuild(pools=("policy", "samples"), incarnation=1),)
    assert machine(on.Failed(failure=DEATH, incarnation=0)) == ()  # the same death again, late
    assert machine(on.StepDone(step=1, incarnation=0)) == ()
    restore = machine(on.Rebuilt(incarnation=1, staged=(0,)))
    assert restore == (do.Restore(step=0, place=Place.memory, incarnation=1),)
    assert machine.restored(0) == (
        do.Reconnect(),
        do.Rewind(step=0),
        do.RunStep(step=1, incarnation=1),
    )


def test_a_gradient_that_is_not_finite_goes_back_without_a_restart() -> None:
    """FAULTS C10, rewind: nothing is rebuilt and the budget is not spent; answers of the step that
    was given up are late."""
    machine = running()
    machine.step(1)
    assert machine(on.NotFinite(step=1, incarnation=0)) == (), "of a step that has ended"
    quiesce = machine(on.NotFinite(step=2, incarnation=0))
    assert quiesce == (do.Quiesce(lost=(), incarnation=1),)
    assert machine(on.StepDone(step=2, incarnation=0)) == ()
    assert machine(on.Quiesced(incarnation=1)) == (do.Rebuild(pools=(), incarnation=1),)
    restore = machine(on.Rebuilt(incarnation=1, staged=(0, 1)))
    assert restore == (do.Restore(step=1, place=Place.memory, incarnation=1),)
    assert machine.restored(1)[-1] == do.RunStep(step=2, incarnation=1)
    assert machine.state.budget.restarts == 0


def test_a_lost_node_is_disk_then_the_start() -> None:
    machine = running(flush_every=1)
    machine.step(1)
    machine(on.Flushed(step=1, number=1), on.Committed(step=1, number=1))
    machine.step(2)
    machine.recover()
    assert machine.actions == (do.Restore(step=1, place=Place.disk, incarnation=1),)
    nothing = running()
    nothing.recover()
    rest = do.Rebuild(pools=("samples",), incarnation=1)
    assert nothing.actions == (rest,), "only new processes hold the weights of the start"
    nothing(on.Rebuilt(incarnation=1))
    assert kinds(nothing.actions) == [do.Report, do.Restore]
    assert nothing.actions[1] == do.Restore(step=-1, place=Place.start, incarnation=1)


def test_budget_counts_restarts_without_progress() -> None:
    machine = running(max_restarts=2)
    for _ in range(2):
        machine.recover(staged=(0,))
        machine.restored(0)
    machine.step(1)  # progress
    for _ in range(2):
        machine.recover(staged=(1,))
        machine.restored(1)
    *_, stop = machine(on.Failed(failure=DEATH, incarnation=machine.state.built["policy"]))
    assert isinstance(stop, do.Stop) and stop.code is Exit.gave_up
    assert "recovery.max_restarts" in stop.reason


def test_a_value_error_is_never_retried_and_an_exception_once() -> None:
    user = replace(DEATH, kind=Kind.user_error, cause="actor.lr is -1; use more than 0")
    machine = running()
    *_, stop = machine(on.Failed(failure=user, incarnation=0))
    assert isinstance(stop, do.Stop) and stop.code is Exit.user_error
    machine = running()  # it comes after the death of a peer that it caused
    *_, stop = machine(
        on.Failed(failure=DEATH, incarnation=0), on.Failed(failure=user, incarnation=0)
    )
    assert isinstance(stop, do.Stop) and stop.code is Exit.user_error
    raised = replace(DEATH, kind=Kind.raised, cause="ZeroDivisionError", step=1)
    machine = running()
    machine.recover(raised, staged=(0,))
    machine.restored(0)
    *_, stop = machine(on.Failed(failure=raised, incarnation=1))
    assert isinstance(stop, do.Stop) and "the same failure twice" in stop.reason


def test_a_restore_that_fails_takes_the_commit_before() -> None:
    machine = Machine()
    machine.start(staged=(6,), durable=(4, 6))
    assert machine.actions == (do.Restore(step=6, place=Place.memory, incarnation=0),)
    failed = on.RestoreFailed(step=6, place=Place.memory, incarnation=0, damaged=True)
    assert machine(failed)[1:] == (do.Restore(step=6, place=Place.disk, incarnation=0),)
    failed = on.RestoreFailed(step=6, place=Place.disk, incarnation=0)
    assert machine(failed)[1:] == (do.Restore(step=6, place=Place.disk, incarnation=0),)
    assert machine(failed)[1:] == (do.Restore(step=4, place=Place.disk, incarnation=0),)
    assert machine.restored(4)[:4] == (
        do.SetAside(step=6, place=Place.disk),
        do.SetAside(step=6, place=Place.memory),
        do.Reconnect(),
        do.Rewind(step=4),
    )
    machine = Machine()
    machine.start(durable=(4,))
    *_, stop = machine(on.RestoreFailed(step=4, place=Place.disk, incarnation=0, damaged=True))
    assert isinstance(stop, do.Stop) and stop.code is Exit.gave_up


def test_a_notice_leaves_at_once_with_the_last_snapshot() -> None:
    machine = running()
    machine.step(1)
    actions = machine(on.Draining(deadline=30.0, notice="SIGTERM"))
    assert actions[1:] == (do.Flush(step=1, number=1),)
    assert machine(on.StepDone(step=2, incarnation=0)) == ()
    assert machine(on.Failed(failure=DEATH, incarnation=0)) == ()
    machine(on.FlushFailed(step=1, number=1))
    assert machine(on.Tick()) == (do.Flush(step=1, number=2),)
    machine(on.Flushed(step=1, number=2))
    *_, stop = machine(on.Committed(step=1, number=2))
    assert isinstance(stop, do.Stop) and stop.code is Exit.preempted


def test_a_notice_gives_up_the_flush_of_an_older_step() -> None:
    """Its processes may be in the middle of a step, or be ended by the same notice."""
    machine = running(flush_every=1)
    machine.step(1)
    machine.step(2)
    actions = machine(on.Draining(deadline=30.0, notice="SIGTERM"))
    assert actions[1:] == (do.Flush(step=2, number=2),)


def test_a_run_whose_last_step_is_in_memory_alone_is_written_to_disk() -> None:
    machine = Machine()
    actions = machine(on.Started(pools=(), held=4, last=True, staged=(4,)))
    assert actions == (do.Export(step=4),)
    assert machine(on.Tick()) == (do.Flush(step=4, number=1),)
    machine = Machine()
    (stop,) = machine(on.Started(pools=(), held=4, last=True, durable=(4,)))
    assert stop == do.Stop(code=Exit.done)


@pytest.mark.parametrize("staged", [(), (3, 4)])
def test_a_finished_run_without_its_model_is_exported_and_committed_again(
    staged: tuple[int, ...],
) -> None:
    machine = Machine()
    machine.start(staged=staged, durable=(3, 4), without_model=(3, 4))
    actions = machine(on.Restored(step=4, incarnation=0, last=True))
    export, *stage = [action for action in actions[2:] if not isinstance(action, do.Report)]
    assert export == do.Export(step=4)
    if staged:
        assert not stage and machine(on.Tick()) == (do.Flush(step=4, number=1),)
    else:
        assert stage == [do.Stage(step=4, incarnation=0)]
        assert do.Flush(step=4, number=1) in machine(on.Staged(step=4, incarnation=0))
    machine(on.Flushed(step=4, number=1))
    assert machine(on.Committed(step=4, number=1))[-1] == do.Stop(code=Exit.done)


def test_a_last_commit_without_its_model_is_not_the_end() -> None:
    machine = running()
    machine.step(1, last=True)
    machine(on.Flushed(step=1, number=1))
    actions = machine(on.Committed(step=1, number=1, without_model=True))
    assert kinds(actions) == [do.Prune, do.Export]
    assert machine(on.Tick()) == (do.Flush(step=1, number=2),)
    assert machine(on.Committed(step=1, number=2))[-1] == do.Stop(code=Exit.done)


def test_a_notice_after_a_commit_writes_no_second_one() -> None:
    """It would be without what was exported for the first, which it would replace."""
    machine = running()
    machine.step(1, last=True)
    machine(on.Flushed(step=1, number=1))
    actions = machine(on.Draining(deadline=30.0, staged=(0, 1), durable=(1,)))
    assert kinds(actions) == [do.Report, do.Stop] and machine.state.phase is Phase.stopped


def test_a_start_that_holds_its_state_goes_on_from_there() -> None:
    machine = Machine()
    started = on.Started(pools=("policy",), held=3, staged=(3,), restarts=2, furthest=7)
    assert machine(started) == (do.RunStep(step=4, incarnation=0),)
    assert (machine.state.budget.restarts, machine.state.budget.furthest) == (2, 7)


def test_a_flush_is_due_after_its_seconds_too() -> None:
    machine = running(flush_seconds=60.0)
    assert do.Flush not in kinds(machine.step(1))
    machine.now = 61.0
    assert do.Flush in kinds(machine.step(2))


def test_the_best_step_is_exported_where_it_is_flushed() -> None:
    machine = running(flush_every=2)
    for step, flushed in ((1, False), (2, True)):
        actions = machine(on.StepDone(step=step, incarnation=0, best=True))
        assert (do.Export in kinds(actions)) == flushed
        machine(on.Staged(step=step, incarnation=0))


def test_a_notice_shorter_than_a_flush_ends_at_its_deadline() -> None:
    machine = running()
    machine(on.Draining(deadline=3.0, notice="SIGTERM"))
    machine(on.Draining(deadline=60.0, notice="SIGTERM again"))
    machine.now = 3.0
    (stop,) = machine(on.Tick())
    assert isinstance(stop, do.Stop) and stop.code is Exit.preempted


def test_the_loser_of_a_fence_writes_nothing() -> None:
    machine = running(flush_every=1)
    machine.step(1)
    actions = machine(on.Fenced())
    assert kinds(actions) == [do.Stop] and machine.state.phase is Phase.stopped
    assert machine(on.Flushed(step=1, number=1)) == ()


def test_a_replayed_step_with_another_digest_is_said() -> None:
    for deterministic in (False, True):
        machine = running(deterministic=deterministic)
        machine.step(1, digest="a")
        machine.recover(staged=(0,))
        machine.restored(0)
        machine(on.StepDone(step=1, incarnation=machine.state.incarnation))
        staged = on.Staged(
            step=1, incarnation=machine.state.incarnation, digest="b", difference="actor: model.w"
        )
        first, *_ = machine(staged)
        text = first.reason if isinstance(first, do.Stop) else first.text
        assert isinstance(first, do.Stop if deterministic else do.Report)
        assert text.endswith("its digest differs: a, now b; first in actor: model.w")
    same = running(deterministic=True)
    same.step(1, digest="a")
    same.recover(staged=(0,))
    same.restored(0)
    assert do.RunStep in kinds(same.step(1, digest="a"))


def test_the_supervisor_restarts_crashes_and_nothing_else() -> None:
    budget = Budget(max_restarts=2)
    for code in Exit:
        refusal = after_exit(budget, code, furthest=3)[1]
        assert bool(refusal) == (code is not Exit.failed)
    for furthest in (3, 3, 4, 4):  # progress in between
        budget, refusal = after_exit(budget, -9, furthest=furthest)
        assert not refusal
    _, refusal = after_exit(budget, -9, furthest=4)
    assert "recovery.max_restarts" in refusal
