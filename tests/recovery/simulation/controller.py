"""A controller in virtual time: carries out the machine's actions as controllers/recovery.py does,
with a wait, at which it may be killed, before and inside each of them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybridflow.checkpoint import Checkpoint, CheckpointStore, load_metadata
from hybridflow.recovery import actions as do
from hybridflow.recovery import attempts
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action, Exit
from hybridflow.recovery.attempts import Attempt
from hybridflow.recovery.events import Event, Failure, Kind, Place
from hybridflow.recovery.machine import Phase, Policy, State, begin, decide
from tests.recovery.simulation.cluster import (
    RANKS_PER_NODE,
    ROWS_PER_STEP,
    TRAINED,
    Cluster,
    MemoryFile,
    Rank,
    Record,
    Wait,
    Weights,
    digest,
    is_whole,
    ledger_line,
    mix,
    rows_from,
    sample,
    start_weights,
    updated,
)
from tests.recovery.simulation.crash_files import File, SimulatedPath

QUIESCE_S = 5.0
CALL_DEADLINE_S = 20.0
DEVICES_S = 15.0
RUN = "run"


class Lost(Exception):
    """An action was answered by Failed or Fenced."""

    def __init__(self, event: Event) -> None:
        super().__init__(str(event))
        self.event = event


class Abandoned(Exception):
    """An event that came meanwhile ended the action."""

    def __init__(self, actions: tuple[Action, ...]) -> None:
        super().__init__()
        self.actions = actions


@dataclass(frozen=True, slots=True)
class Bugs:
    """Mistakes that a driver or a store could make; the simulation must find each of them."""

    prune_early: bool = False
    """Older commits are removed before the new one is there."""
    cursor_ahead: bool = False
    """The commit holds the position of rows that were drawn but not trained."""
    no_fence: bool = False
    no_forced_sync: bool = False
    no_rename_sync: bool = False
    """Names are not synced."""
    no_file_sync: bool = False
    ledger_not_synced: bool = False
    """The commit does not sync the ledger first."""


class PruningEarly(CheckpointStore):
    def begin(self, step: int) -> Any:
        for checkpoint in self.all():
            self._disk.remove(checkpoint.path)
        return super().begin(step)


class Unfenced(Attempt):
    def check(self) -> None:
        pass


@dataclass(slots=True)
class Watch:
    """What the rules look at; filled by all attempts of a run."""

    restores: list[tuple[int, Place]]
    broken: list[str]
    restarts: int = 0
    """Rebuilds since the last step that was committed for the first time."""
    furthest: int = -1
    durable: bool = False
    num_events: int = 0

    def committed(self, step: int) -> None:
        if step > self.furthest:
            self.furthest, self.restarts = step, 0


class Controller:
    def __init__(
        self,
        cluster: Cluster,
        *,
        attempt: int,
        layout: dict[str, list[tuple[str, int]]],
        policy: Policy,
        num_steps: int,
        bugs: Bugs,
        watch: Watch,
        expected: Callable[[int], Any],
        flush_seconds: Callable[[], float],
        doubled: frozenset[int],
    ) -> None:
        self.cluster, self.attempt, self.layout = cluster, attempt, layout
        self.num_steps, self.bugs, self.watch = num_steps, bugs, watch
        self.expected, self.flush_seconds, self.doubled = expected, flush_seconds, doubled
        self.state: State = begin(policy)
        self.inbox: deque[Event] = deque()
        self.status: int | None = None
        self.reason = ""
        self.position = 0
        self.synced = 0
        """The controller's belief: the version of the actor that the generator holds."""
        self.version = 0
        """The number of the actor's updates."""
        self.rows: tuple[int, ...] = ()
        self.restored: Any = None
        self.root = SimulatedPath(cluster.files, RUN)
        self.claim: Attempt
        self.store: Any
        self.ledger: File | None = None
        self.doing: Action | None = None

    # The loop of the driver.

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
        started = on.Started(
            pools=tuple(self.layout),
            staged=staged,
            durable=durable,
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

    def decide(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = decide(self.state, event, self.cluster.now)
        return actions

    def put(self, event: Event) -> None:
        self.watch.num_events += 1
        self.inbox.append(event)
        if self.watch.num_events in self.doubled and not isinstance(event, on.Pruned):
            self.cluster.after(5.0, lambda: self.inbox.append(event))

    def poll(self) -> Wait:
        """Takes the events that came while an action waits."""
        while self.inbox:
            incarnation = self.state.incarnation
            actions = self.decide(self.inbox.popleft())
            ended = self.state.phase in (Phase.leaving, Phase.stopped)
            if ended or self.state.incarnation != incarnation:
                raise Abandoned(actions)
            for action in actions:
                yield from self.carry_out(action)

    def carry_out(self, action: Action) -> Wait:
        match action:
            case do.RunStep():
                yield from self.run_step(action)
            case do.Stage():
                yield from self.stage(action)
            case do.Record():
                yield from self.record(action)
            case do.Export():
                yield from self.call("actor", 0.5, "save_pretrained")
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

    def check_fence(self) -> Wait:
        try:
            self.claim.check()
        except attempts.Fenced:
            raise Lost(on.Fenced()) from None
        yield 0.01  # an attempt that begins here is not seen any more

    # Ranks.

    def ranks(self, role: str) -> list[Rank]:
        return [
            rank
            for rank in self.cluster.ranks
            if rank.attempt == self.attempt and rank.role == role
        ]

    def wait(self, seconds: float) -> Wait:
        left = seconds
        while left > 0:
            yield min(left, 1.0)
            left -= 1.0
            yield from self.poll()

    def call(
        self, role: str, seconds: float, method: str, work: Callable[[Rank], None] | None = None
    ) -> Wait:
        """A collective call: works on the first rank halfway, on the others at its end."""
        ranks = self.ranks(role)
        yield from self.wait(seconds / 2)
        if work is not None and not ranks[0].trouble:
            work(ranks[0])
        yield from self.wait(seconds / 2)
        for rank in ranks:
            if rank.trouble:
                yield from self.notice(rank, method)
        for rank in ranks[1:]:
            if work is not None:
                work(rank)

    def notice(self, rank: Rank, method: str) -> Wait:
        """Reports the rank that died, hung, or raised; a hang shows at the deadline."""
        if rank.trouble == "hung":
            yield from self.wait(CALL_DEADLINE_S)
        kind = Kind(rank.trouble) if rank.trouble else Kind.died
        failure = Failure(
            kind=kind,
            pool=rank.pool,
            role=rank.role,
            rank=rank.index,
            method=method,
            cause=f"{kind} at {self.cluster.now:.3f}" if kind is Kind.raised else kind,
            step=self.state.step,
        )
        self.watch.num_events += 1
        failed = on.Failed(failure=failure, incarnation=rank.incarnation)
        if self.watch.num_events in self.doubled:
            self.cluster.after(7.0, lambda: self.inbox.append(failed))
        raise Lost(failed)

    # A step.

    def run_step(self, action: do.RunStep) -> Wait:
        last = action.step == self.num_steps
        if action.step == 0:
            yield from self.call("generator", 1.0, "validate")
            self.rows = ()
            self.put(on.StepDone(step=0, incarnation=action.incarnation, last=last))
            return
        yield from self.synchronize()
        rows = rows_from(self.position)
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
        self.version += 1
        self.rows = rows
        self.put(on.StepDone(step=action.step, incarnation=action.incarnation, last=last))

    def synchronize(self) -> Wait:
        if self.synced == self.version:
            return

        def receive(rank: Rank) -> None:
            rank.generator = digest({"actor": self.weights("actor")})

        yield from self.call("actor", 0.3, "send_weights")
        yield from self.call("generator", 0.3, "receive_weights", receive)
        self.synced = self.version

    def weights(self, role: str) -> Weights:
        tensors: Weights = {}
        for rank in self.ranks(role):
            tensors |= rank.tensors
        return tensors

    # Snapshots in memory.

    def stage(self, action: do.Stage) -> Wait:
        files = []
        for role in TRAINED:

            def write(rank: Rank) -> None:
                key = (self.claim.number, action.step, rank.role, rank.index)
                rank.node.memory[key] = MemoryFile(dict(rank.tensors))
                files.append((rank.node, key))

            yield from self.call(role, 0.2, "save_snapshot", write)
        weights = {role: self.weights(role) for role in TRAINED}
        number = digest(weights)
        metadata = {
            "step": action.step,
            "position": self.position + (ROWS_PER_STEP if self.bugs.cursor_ahead else 0),
            "version": self.version,
            "line": ledger_line(action.step, self.rows, number),
        }
        yield from self.check_fence()
        self.cluster.records[self.claim.number, action.step] = Record(
            self.claim.number, action.step, tuple(files), metadata
        )
        self.watch.committed(action.step)
        self.put(
            on.Staged(step=action.step, incarnation=action.incarnation, digest=f"{number:016x}")
        )

    def memory_commits(self) -> dict[int, Record]:
        """By step, that of the newest attempt."""
        commits = {}
        for (attempt, step), record in sorted(self.cluster.records.items()):
            if attempt <= self.claim.number and record.is_whole():
                commits[step] = record
        return commits

    # Ledger and metrics.

    def ledger_lines(self) -> list[str]:
        path = self.root / "ledger"
        if not path.is_file():
            return []
        lines = path.read_text().split("\n")[:-1]
        whole = []
        for number, line in enumerate(lines):
            if not line.startswith(f"{number} ") or not is_whole(line):
                break
            whole.append(line)
        return whole

    def ledger_digests(self) -> dict[int, str]:
        return {number: line.split(" ")[2] for number, line in enumerate(self.ledger_lines())}

    def record(self, action: do.Record) -> Wait:
        yield from self.check_fence()
        if self.ledger is None:
            raise AssertionError("Record before Rewind")
        weights = {role: self.weights(role) for role in TRAINED}
        if len(self.ledger_lines()) > action.step:
            return  # logged before a crash or a failed flush
        line = ledger_line(action.step, self.rows, digest(weights))
        self.cluster.files.change(grows=False)
        self.ledger.data += f"{line}\n".encode()

    def rewind(self, action: do.Rewind) -> Wait:
        """Puts a new file in the place of the old one: an attempt that was fenced a moment ago
        goes on writing into the old one."""
        yield from self.check_fence()
        lines = self.ledger_lines()[: action.step + 1]
        self.position, self.version, self.rows = 0, 0, ()
        if action.step >= 0:
            self.position = self.restored["position"]
            self.version = self.restored["version"]
            if len(lines) == action.step:
                lines.append(self.restored["line"])
        path = self.root / ".ledger"
        self.cluster.files.write_synced(path, "".join(f"{line}\n" for line in lines))
        path.replace(self.root / "ledger")
        self.cluster.files.sync(self.root)
        self.ledger = (self.root / "ledger").file()

    # The disk.

    def start_flush(self, action: do.Flush) -> None:
        record = self.memory_commits().get(action.step)
        if record is None:
            self.put(on.FlushFailed(step=action.step, number=action.number, lost=True))
            return

        def ended() -> None:
            flush = self.state.flush
            answered = [event for event in self.inbox if isinstance(event, on.Flushed)]
            if flush is not None and flush.number == action.number and not answered:
                self.put(on.FlushFailed(step=action.step, number=action.number, cause="died"))

        self.cluster.spawn(self.flush(action, record), self.attempt, ended)

    def flush(self, action: do.Flush, record: Record) -> Wait:
        try:
            directory = self.store.begin(action.step)
            for node, key in record.files:
                yield self.flush_seconds()
                if self.state.flush is None or self.state.flush.number != action.number:
                    return
                file = node.memory.get(key)
                if file is None or file.damaged:
                    self.put(on.FlushFailed(step=action.step, number=action.number, lost=True))
                    return
                _, _, role, rank = key
                path = directory / f"{role}.{rank}.json"
                path.write_bytes(json.dumps(file.tensors).encode())
        except (OSError, ValueError) as error:
            self.put(on.FlushFailed(step=action.step, number=action.number, cause=str(error)))
            return
        except attempts.Fenced:
            self.put(on.Fenced())
            return
        self.put(on.Flushed(step=action.step, number=action.number))

    def commit(self, action: do.Commit) -> Wait:
        yield from self.check_fence()
        record = self.cluster.records.get((self.claim.number, action.step))
        if record is None:
            record = self.memory_commits().get(action.step)
        try:
            if record is None:
                raise OSError("its record is gone")
            if self.ledger is not None and not self.bugs.ledger_not_synced:
                self.cluster.files.change()
                self.ledger.synced = self.ledger.data
            self.store.commit(action.step, dict(record.metadata))
        except (OSError, ValueError) as error:
            self.put(on.FlushFailed(step=action.step, number=action.number, cause=str(error)))
            return
        except attempts.Fenced:
            raise Lost(on.Fenced()) from None
        self.watch.durable = True
        self.watch.committed(action.step)
        self.put(on.Committed(step=action.step, number=action.number))

    def prune(self, action: do.Prune) -> Wait:
        yield from self.check_fence()
        if action.place is Place.disk:  # the store's commit pruned
            durable = {checkpoint.step for checkpoint in self.store.all()}
            self.put(on.Pruned(durable=tuple(sorted(durable))))
            return
        for attempt, step in list(self.cluster.records):
            if attempt <= self.claim.number and step not in action.protected:
                record = self.cluster.records.pop((attempt, step))
                for node, key in record.files:
                    node.memory.pop(key, None)

    def set_aside(self, action: do.SetAside) -> Wait:
        yield from self.check_fence()
        if action.place is Place.memory:
            for key in list(self.cluster.records):
                if key[1] == action.step:
                    del self.cluster.records[key]
            return
        for checkpoint in self.store.all():
            if checkpoint.step == action.step:
                self.store.set_aside(checkpoint.path)

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
        if action.incarnation > 0:
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

    def read(self, action: do.Restore) -> dict[str, Weights]:
        """The weights of a commit, and its metadata in self.restored."""
        if action.place is Place.start:
            return {}
        if action.place is Place.memory:
            record = self.memory_commits().get(action.step)
            if record is None:
                raise FileNotFoundError("it is not in memory any more")
            parts = []
            for node, key in record.files:
                file = node.memory[key]
                if file.damaged:
                    raise ValueError("its digest differs")
                parts.append((key[2], file.tensors))
            self.restored = record.metadata
            return joined(parts)
        checkpoint = self.checkpoint(action.step)
        self.restored = load_metadata(checkpoint.path, disk=self.cluster.files)  # type: ignore[arg-type]
        parts = []
        for path in checkpoint.path.glob("*.json"):
            if path.name != "manifest.json":
                tensors = json.loads(path.read_text())
                parts.append((path.name.split(".")[0], {int(key): tensors[key] for key in tensors}))
        return joined(parts)

    def checkpoint(self, step: int) -> Checkpoint:
        for checkpoint in self.store.all():
            if checkpoint.step == step:
                return checkpoint
        raise ValueError(f"no checkpoint of step {step}")


def joined(parts: list[tuple[str, Weights]]) -> dict[str, Weights]:
    """All tensors, each exactly once."""
    weights: dict[str, Weights] = {role: {} for role in TRAINED}
    for role, tensors in parts:
        for tensor, value in tensors.items():
            if tensor in weights[role]:
                raise ValueError(f"{role} {tensor} is there twice")
            weights[role][tensor] = value
    for role in TRAINED:
        if weights[role].keys() != start_weights(role).keys():
            raise ValueError(f"{role} is not complete")
    return weights
