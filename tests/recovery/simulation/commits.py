"""What a controller in virtual time writes and reads: snapshots in memory, the ledger, commits on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hybridflow.checkpoint import Checkpoint, load_metadata
from hybridflow.recovery import actions as do
from hybridflow.recovery import attempts
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Action
from hybridflow.recovery.events import Event, Place
from tests.recovery.simulation.calls import Calls, Lost
from tests.recovery.simulation.cluster import (
    ROWS_PER_STEP,
    TRAINED,
    MemoryFile,
    Rank,
    Record,
    Wait,
    Weights,
    digest,
    is_whole,
    ledger_line,
    start_weights,
)
from tests.recovery.simulation.crash_files import File

EXPORT = "huggingface"


class Commits(Calls):
    """The actions that write and read files."""

    def decide(self, event: Event) -> tuple[Action, ...]:
        """A notice comes with what is there when it comes, as the driver's does."""
        if isinstance(event, on.Draining):
            durable = tuple(sorted({checkpoint.step for checkpoint in self.store.all()}))
            staged = tuple(sorted(self.memory_commits()))
            event = replace(event, staged=staged, durable=durable)
        return super().decide(event)

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
            "rows": list(self.rows),
            "line": ledger_line(action.step, self.rows, number),
            "unwritten": self.ledger_lines()[: action.step] if self.ledger_waits else [],
        }
        yield from self.check_fence()
        self.cluster.records[self.claim.number, action.step] = Record(
            self.claim.number, action.step, tuple(files), metadata
        )
        self.watch.committed(action.step)
        self.put(
            on.Staged(
                step=action.step,
                incarnation=action.incarnation,
                digest=line_digest(str(metadata["line"])),
            )
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
        path, file = self.root / "ledger", self.ledger
        if not self.ledger_waits and not path.is_file():
            return []
        if file is None or not self.ledger_waits:
            file = path.file()
        lines = file.data.decode("utf-8", "replace").split("\n")[:-1]
        whole = []
        for number, line in enumerate(lines):
            if not line.startswith(f"{number} ") or not is_whole(line):
                break
            whole.append(line)
        return whole

    def ledger_digests(self) -> dict[int, str]:
        return {number: line_digest(line) for number, line in enumerate(self.ledger_lines())}

    def record(self, action: do.Record) -> Wait:
        yield from self.check_fence()
        if self.ledger is None:
            raise AssertionError("Record before Rewind")
        weights = {role: self.weights(role) for role in TRAINED}
        if len(self.ledger_lines()) > action.step:
            return  # logged before a crash or a failed flush
        line = ledger_line(action.step, self.rows, digest(weights))
        if self.cluster.files.full and not self.ledger_waits:
            self.ledger, self.ledger_waits = File(self.ledger.data), True
        self.ledger.data += f"{line}\n".encode()
        self.try_ledger()

    def rewind(self, action: do.Rewind) -> Wait:
        """Puts a new file in the place of the old one: an attempt that was fenced a moment ago
        goes on writing into the old one."""
        yield from self.check_fence()
        lines = self.ledger_lines()[: action.step + 1]
        if action.step >= 0 and self.restored["unwritten"]:
            lines = list(self.restored["unwritten"])
        self.position, self.version, self.rows = 0, 0, ()
        if action.step >= 0:
            self.position = self.restored["position"]
            self.version = self.restored["version"]
            self.rows = tuple(self.restored["rows"])  # its line may be written once more
            if len(lines) == action.step:
                lines.append(self.restored["line"])
        self.ledger = File("".join(f"{line}\n" for line in lines).encode())
        self.ledger_waits = True
        self.try_ledger()

    def try_ledger(self) -> None:
        try:
            if self.ledger_waits:
                self.write_ledger()
        except OSError:
            return  # its lines wait for room

    def write_ledger(self) -> None:
        """Puts the ledger that waits in the place of the one on disk. An OSError on a full disk."""
        if self.ledger is None:
            return
        if not self.ledger_waits:
            self.cluster.files.change()
            return
        path = self.root / ".ledger"
        self.cluster.files.write_synced(path, self.ledger.data.decode())
        path.replace(self.root / "ledger")
        self.cluster.files.sync(self.root)
        self.ledger, self.ledger_waits = (self.root / "ledger").file(), False

    # The disk.

    def export(self, action: do.Export) -> Wait:
        if not self.exports:
            yield from self.call("actor", 0.5, "save_pretrained")
            return
        yield from self.check_fence()
        number = digest({"actor": self.weights("actor")})
        try:
            directory = self.store.add(action.step, EXPORT)
            self.write_export(action.step, directory, "half")
            yield from self.call("actor", 0.5, "save_pretrained")
            yield from self.check_fence()
            self.write_export(action.step, directory, f"{number:016x}")
            self.store.end_add(action.step, EXPORT)
        except OSError as error:
            if not self.bugs.export_not_tried_again:
                self.put(on.ExportFailed(step=action.step, cause=str(error)))
        except attempts.Fenced:
            raise Lost(on.Fenced()) from None

    def write_export(self, step: int, directory: Any, model: str) -> None:
        try:
            directory.mkdir(exist_ok=True)
            (directory / "model").write_bytes(model.encode())
        except OSError:
            self.store.remove_added(step)
            raise

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
            if self.ledger_waits:
                self.write_ledger()
            ledger, path = self.ledger, self.root / "ledger"
            if ledger is None and path.is_file():
                ledger = path.file()  # a notice came before Rewind
            if ledger is not None and not self.bugs.ledger_not_synced:
                self.cluster.files.change()
                ledger.synced = ledger.data
            self.store.commit(action.step, dict(record.metadata))
        except (OSError, ValueError) as error:
            self.put(on.FlushFailed(step=action.step, number=action.number, cause=str(error)))
            return
        except attempts.Fenced:
            raise Lost(on.Fenced()) from None
        self.watch.durable = True
        self.watch.committed(action.step)
        without_model = action.step in self.without_model()
        committed = on.Committed(
            step=action.step, number=action.number, without_model=without_model
        )
        self.put(committed)

    def without_model(self) -> tuple[int, ...]:
        """Steps of the commits on disk that hold no model."""
        steps: list[int] = []
        if not self.exports or self.bugs.export_not_tried_again:
            return ()
        for checkpoint in self.store.all():
            if not (checkpoint.path / EXPORT).is_dir():
                steps.append(checkpoint.step)
        return tuple(steps)

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


def line_digest(line: str) -> str:
    """That of a step's rows and weights: the line's checksum."""
    return line.rpartition(" ")[2]


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
