"""A controller in virtual time: carries out the machine's actions as controllers/recovery.py does,
with a wait, at which it may be killed, before and inside each of them."""

from __future__ import annotations

from collections import deque
from typing import Any

from hybridflow.checkpoint import CheckpointStore
from hybridflow.recovery import actions as do
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action, Exit
from hybridflow.recovery.attempts import Attempt
from tests.recovery.simulation.bugs import PruningEarly, Unfenced
from tests.recovery.simulation.calls import Abandoned, Lost
from tests.recovery.simulation.cluster import (
    RANKS_PER_NODE,
    ROWS_PER_STEP,
    TRAINED,
    Rank,
    Wait,
    Weights,
    digest,
    marked,
    mix,
    rows_from,
    sample,
    start_weights,
    updated,
)
from tests.recovery.simulation.commits import Commits

QUIESCE_S = 5.0
DEVICES_S = 15.0


class Controller(Commits):
    """The loop of the driver, steps, and recovery."""

    def run(self) -> Wait:
        try:
            yield from self.drive()
        except (OSError, ValueError) as error:  # a full or damaged disk at the start: a crash
            self.reason, self.status = str(error), int(Exit.failed)

    def drive(self) -> Wait:
        files: Any = self.cluster.files
        root: Any = self.root
        kind = Unfenced if self.bugs.no_fence else Attempt
        self.claim = kind.claim(root, disk=files)
        store = PruningEarly if self.bugs.prune_early else CheckpointStore
        self.store = store(root / "checkpoints", disk=files, attempt=self.claim)
        yield 0.1
        staged = tuple(sorted(self.memory_commits()))
        durable = tuple(sorted({checkpoint.step for checkpoint in self.store.all()}))
        # A step that is committed again is no progress.
        self.watch.furthest = max((self.watch.furthest, *staged, *durable))
        started = on.Started(
            pools=tuple(self.layout),
            staged=staged,
            durable=durable,
            without_model=self.without_model(),
            digests=self.ledger_digests(),
            restarts=0,
        )
        actions: deque[Action] = deque(self.decide(started))
        while self.status is None:
            try:
                if actions:
                    self.doing = actions.popleft()
                    yield 0.01
                    yield from self.carry_out(self.doing)
                    continue
                while not self.inbox:
                    yield 1.0
                    self.inbox.append(on.Tick())
                actions.extend(self.decide(self.inbox.popleft()))
            except Lost as lost:
                actions = deque(self.decide(lost.event))
            except Abandoned as abandoned:
                actions = deque(abandoned.actions)

    def carry_out(self, action: Action) -> Wait:
        match action:
            case do.RunStep():
                yield from self.run_step(action)
            case do.Stage():
                yield from self.stage(action)
            case do.Record():
                yield from self.record(action)
            case do.Export():
                yield from self.export(action)
            case do.Flush():
                self.start_flush(action)
            case do.Commit():
                yield from self.commit(action)
            case do.Prune():
                yield from self.prune(action)
            case do.SetAside():
                yield from self.set_aside(action)
            case do.Report():
                pass
            case do.Quiesce():
                yield from self.quiesce(action)
            case do.Rebuild():
                yield from self.rebuild(action)
            case do.Restore():
                yield from self.restore(action)
            case do.Reconnect():
                if not self.bugs.no_forced_sync:
                    self.synced = -1
            case do.Rewind():
                yield from self.rewind(action)
            case do.Stop():
                self.reason = action.reason
                self.status = int(action.code)

    # A step.

    def run_step(self, action: do.RunStep) -> Wait:
        last = action.step == self.num_steps
        if action.step == 0:
            yield from self.call("generator", 1.0, "validate")
            self.rows = ()
            self.put(on.StepDone(step=0, incarnation=action.incarnation, last=last))
            return
        yield from self.synchronize()
        passed_over: tuple[int, ...] = ()
        while self.position in self.given_up:
            passed_over += marked(rows_from(self.position))
            self.position += ROWS_PER_STEP
        position, rows = self.position, rows_from(self.position)
        self.position += ROWS_PER_STEP
        yield from self.call("generator", 1.5, "generate_sequences")
        (generator,) = self.ranks("generator")
        before = self.expected(action.step - 1)
        if generator.generator != digest({"actor": before["actor"]}):
            self.watch.broken.append(f"step {action.step} was sampled with other weights")
        drawn = sample(generator.generator, rows)
        yield from self.call("critic", 0.5, "compute_values")
        numbers = mix(drawn, digest({"critic": self.weights("critic")}))
        for role in TRAINED:

            def update(rank: Rank) -> None:
                for tensor, value in rank.tensors.items():
                    rank.tensors[tensor] = updated(rank.role, tensor, value, rows, numbers)

            yield from self.call(role, 1.0, f"update_{role}", update)
            if position in self.not_finite:  # the role before it was updated
                if not self.bugs.forgets_given_up:
                    self.given_up.add(position)
                self.put(on.NotFinite(step=action.step, incarnation=action.incarnation))
                return
        self.version += 1
        self.rows = passed_over + rows
        self.put(on.StepDone(step=action.step, incarnation=action.incarnation, last=last))

    def synchronize(self) -> Wait:
        if self.synced == self.version:
            return

        def receive(rank: Rank) -> None:
            rank.generator = digest({"actor": self.weights("actor")})

        yield from self.call("actor", 0.3, "send_weights")
        yield from self.call("generator", 0.3, "receive_weights", receive)
        self.synced = self.version

    # Recovery.

    def quiesce(self, action: do.Quiesce) -> Wait:
        silent = []
        yield from self.wait(1.0)
        for rank in self.cluster.ranks:
            mine = rank.attempt == self.attempt
            if mine and rank.trouble and rank.pool not in (*action.lost, *silent):
                silent.append(rank.pool)
        if silent:
            yield from self.wait(QUIESCE_S)
        self.put(on.Quiesced(incarnation=action.incarnation, silent=tuple(silent)))

    def rebuild(self, action: do.Rebuild) -> Wait:
        if action.incarnation > 0 and action.pools:
            self.watch.restarts += 1
        self.cluster.ranks = [
            rank
            for rank in self.cluster.ranks
            if rank.attempt != self.attempt or rank.pool not in action.pools
        ]
        yield from self.wait(2.0)
        waited = 0.0
        while not self.place(action):
            if waited >= DEVICES_S:
                self.put(on.TooFewDevices(incarnation=action.incarnation))
                return
            yield from self.wait(1.0)
            waited += 1.0
        yield from self.wait(2.0)
        for rank in self.cluster.ranks:
            if rank.attempt == self.attempt and rank.pool in action.pools and rank.trouble:
                yield from self.notice(rank, "start")
        staged = tuple(sorted(self.memory_commits()))
        self.put(on.Rebuilt(incarnation=action.incarnation, staged=staged))

    def place(self, action: do.Rebuild) -> bool:
        free = []
        for node in self.cluster.nodes:
            used = sum(
                rank.node is node and rank.attempt == self.attempt for rank in self.cluster.ranks
            )
            if node.up:
                free += [node] * (RANKS_PER_NODE - used)
        placed = []
        for pool in action.pools:
            for role, num_ranks in self.layout[pool]:
                for index in range(num_ranks):
                    if not free:
                        return False
                    node = free.pop(0)
                    rank = Rank(
                        pool, role, index, num_ranks, node, self.attempt, action.incarnation
                    )
                    self.load(rank, start_weights(role) if role in TRAINED else {})
                    rank.generator = digest({"actor": start_weights("actor")})
                    placed.append(rank)
        self.cluster.ranks += placed
        return True

    def load(self, rank: Rank, weights: Weights) -> None:
        """Nothing in `weights`: the rank has what it was built with, or trained since."""
        loaded = {tensor: value for tensor, value in weights.items() if rank.owns(tensor)}
        rank.tensors = loaded or rank.tensors

    def restore(self, action: do.Restore) -> Wait:
        try:
            weights = self.read(action)
        except (OSError, ValueError) as error:
            yield 0.1
            self.put(
                on.RestoreFailed(
                    step=action.step,
                    place=action.place,
                    incarnation=action.incarnation,
                    damaged=not isinstance(error, FileNotFoundError),
                    lost=isinstance(error, FileNotFoundError),
                    cause=str(error),
                )
            )
            return
        for role in TRAINED:
            yield from self.call(
                role, 0.5, "load_snapshot", lambda rank: self.load(rank, weights.get(rank.role, {}))
            )
        self.watch.restores.append((action.step, action.place))
        if {role: self.weights(role) for role in TRAINED} != self.expected(action.step):
            self.watch.broken.append(f"restored other weights for step {action.step}")
        last = action.step == self.num_steps
        self.put(on.Restored(step=action.step, incarnation=action.incarnation, last=last))
