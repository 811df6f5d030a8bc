"""Saving: what a run can go on from, in memory and on disk, written and read.

A commit is the state of all trained roles after a step and what the controller knows of that step.
Both places hold the same files (hybridflow/snapshots). When to save is left out (loop.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from hybridflow.checkpoint import Checkpoint, CheckpointStore, load_metadata, read_checkpoint
from hybridflow.disk import ROOM
from hybridflow.group import each, start
from hybridflow.manifest import MANIFEST
from hybridflow.results import Results
from hybridflow.snapshots.files import Written
from hybridflow.snapshots.flush import Flushed
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.snapshots.reading import FilesMissing, role_digest
from hybridflow.whole_file import remove_drafts
from workers.roles import TrainedRole

LOGGER = logging.getLogger(__name__)
HUGGING_FACE = "huggingface"
"""Directory of a checkpoint with the model that the run is for."""
MEMORY, DISK = "memory", "disk"


class SnapshotLost(RuntimeError):
    """What memory held of a step is gone or damaged; the disk is not to blame."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A place that the run can go on from."""

    place: str
    """"memory" or "disk"."""
    path: Path
    step: int
    number: int
    """The commit with the higher number is the newer one, whatever their steps."""
    stamp: str | None
    state: dict[str, Any]
    """State of data, algorithm and ledger; for a checkpoint only once it was verified."""

    @property
    def has_model(self) -> bool:
        """Whether it holds the model that the run is for, as a Hugging Face directory."""
        return (self.path / HUGGING_FACE).is_dir()


@dataclass(frozen=True, kw_only=True)
class Flush:
    """A step that is being written to disk."""

    step: int
    number: int
    state: Mapping[str, Any]
    metrics: Mapping[str, float]
    copied: bool
    """Whether hosts copy it from memory, in the background; otherwise its files are there."""
    synced: Mapping[str, Mapping[str, Any]] | None = None
    """Size and digest of the files that are on disk, once all are."""


class Nodes(Protocol):
    """The machines of a run, as far as their memory is concerned."""

    def copy(self, directory: Path, keep: Collection[Path]) -> None:
        """Begins to copy what each node holds of a snapshot to another node, which frees what it has of
        others than `keep`."""

    def fetch(self, directory: Path, role: str, ranks: Collection[int]) -> None:
        """Brings to the nodes of these ranks what other nodes hold of a snapshot."""

    def bring(self, source: Path, target: Path) -> None:
        """Copies a directory in memory, which may be on several nodes, to one that all nodes see."""

    def free(self, directory: Path, keep: Collection[Path]) -> None:
        """Frees all nodes' memory of the snapshots below `directory`, `keep` excepted; of all of it where
        that is empty."""

    def leaving(self) -> dict[str, str]:
        """As Calls.leaving."""


class OneNode:
    """Nodes where there is one: this machine."""

    def copy(self, directory: Path, keep: Collection[Path]) -> None:
        """Nothing: there is no other node."""

    def fetch(self, directory: Path, role: str, ranks: Collection[int]) -> None:
        """Nothing: there is no other node."""

    def bring(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    def free(self, directory: Path, keep: Collection[Path]) -> None:
        """Nothing: there are no copies."""

    def leaving(self) -> dict[str, str]:
        return {}


ONE_NODE = OneNode()


def nothing() -> None:
    pass


class Saving:
    """saving = Saving(trained, store, memory)
    written = saving.stage(7)                            # all ranks write their files into memory
    saving.commit_staged(7, state)                       # atomic: from here on step 7 can be restored
    saving.prune_memory({6, 7})
    saving.begin_flush(7, state, metrics)                # copied to disk in the background
    if saving.is_flushed():
        saving.commit()                                  # atomic

    commit = saving.verified(saving.commits()[0])        # the newest
    saving.load(commit)
    """

    def __init__(
        self,
        trained: Mapping[str, TrainedRole],
        store: CheckpointStore,
        memory: MemoryPlace | None = None,
    ) -> None:
        self.trained, self.store, self.memory = trained, store, memory
        self.nodes: Nodes = ONE_NODE
        self._staged: tuple[int, Path, str] | None = None
        """Step, directory and stamp of the files that memory holds for the newest commit or the
        next."""
        self._committed: Path | None = None
        """The newest commit in memory."""
        self._flush: Flush | None = None
        self._paths: dict[int, Path] = {}
        """Where the steps are that this controller committed to memory."""
        self.before_commit: Callable[[], None] = nothing
        """Puts on disk what a checkpoint relies on besides its own files."""
        self._number = 0
        self.begins_after = 0
        """Checkpoints up to this number are of an earlier run in the same directory, which this one
        does not go on with."""
        self.origin: Commit | None = None
        """The checkpoint that the run began from, where loop.resume named one."""

    # Taking.

    def stage(self, step: int) -> dict[str, Written] | None:
        """Every rank writes its file into memory; returns what the roles' ranks wrote together.
        None without memory. Where memory is short that is said in the log, and from then on
        checkpoints on disk are all there is."""
        memory = self.memory
        if memory is None:
            return None
        self.check_fence()
        target = memory.target(step)
        stamp = f"{target.name}:{self._next_number()}"
        committed = self._committed
        if committed == target:  # the step is staged again: the one before it is what there is
            before = [other for other in self._paths if self._paths[other] != target]
            committed = self._paths[max(before)] if before else None
        keep = () if committed is None else (str(committed),)
        memory.withdraw([Path(path) for path in keep])
        self._staged = None
        answers = {}
        for name, role in self.trained.items():
            answers[name] = start(role.stage_snapshot, str(target), stamp, keep)
        totals = {name: Written.total(list(ranks)) for name, ranks in answers.items()}
        for written in totals.values():
            if written.error:
                LOGGER.warning(
                    "no more snapshots in memory, checkpoints on disk only (recovery."
                    "snapshot_every=0 says nothing of it): %s",
                    written.error,
                )
                self.clear()
                self.memory = None
                return None
        self._staged = step, target, stamp
        return totals

    def commit_staged(self, step: int, state: Mapping[str, Any]) -> None:
        """Makes the staged step the commit that a failure goes back to."""
        assert self.memory is not None and self._staged is not None and self._staged[0] == step
        self.check_fence()
        _, target, stamp = self._staged
        self.memory.commit(target, step=step, number=self._number, stamp=stamp, state=state)
        self._committed = self._paths[step] = target
        self.nodes.copy(target, list(self._paths.values()))

    def prune_memory(self, steps: Collection[int]) -> None:
        """Frees this node's memory of all commits but those of `steps`."""
        if self.memory is not None:
            self._paths = {step: path for step, path in self._paths.items() if step in steps}
            self.memory.prune(set(self._paths.values()))

    def export(self, step: int, role: TrainedRole) -> None:
        """The model that the role holds, as a Hugging Face directory in the next commit of `step`.
        An OSError for what the disk refuses, of which nothing is left."""
        directory = self.store.add(step, HUGGING_FACE)
        for refused in each(role.export_model, str(directory)):
            if refused:
                self.store.remove_added(step)
                raise OSError(refused)
        self.store.end_add(step, HUGGING_FACE)

    def begin_flush(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Begins to write the step that the roles hold to disk: copied from memory in the background
        where that holds it, written by the ranks otherwise. Gives up the one before. An OSError for
        what the disk refuses."""
        self._flush = None
        directory = self.store.begin(step)
        staged = self._staged is not None and self._staged[0] == step
        writing: list[Results[None] | Results[str]] = []
        for name, role in self.trained.items():
            if staged:
                writing.append(start(role.flush_snapshot, str(directory)))
            else:
                writing.append(start(role.try_checkpoint, str(directory / name)))
        for refused in list(chain.from_iterable(writing)):
            if refused:
                raise OSError(refused)
        number = self._number if staged else self._next_number()
        self._flush = Flush(
            step=step, number=number, state=state, metrics=dict(metrics), copied=staged
        )

    def begin_flush_from_here(self, step: int) -> None:
        """Copies a commit in memory to disk without the roles' processes, for a controller that has
        to leave at once. A SnapshotLost where files of it were not brought, or are damaged."""
        assert self.memory is not None
        commits = [commit for commit in self.memory.commits() if commit.step == step]
        if not commits:
            raise SnapshotLost(f"step {step} is not in memory any more")
        newest = commits[0]
        directory = self.store.begin(step)
        for name, of_role in newest.state["ledger"]["roles"].items():
            try:
                self.nodes.bring(newest.path / name, directory / name)
                brought = role_digest(directory / name, newest.stamp)
            except (FileNotFoundError, ValueError) as error:
                raise SnapshotLost(str(error)) from error
            if brought != of_role["digest"]:
                raise SnapshotLost(f"not all files of {name} after step {step} were brought")
        self._flush = Flush(
            step=step, number=newest.number, state=newest.state, metrics={}, copied=False
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether the newest commit, where there is one, is a checkpoint too."""
        timeline = self.timeline()
        return not timeline or timeline[0].step in steps_of(timeline, DISK)

    def write_newest(self) -> None:
        """Makes the newest commit that is whole a checkpoint, where it is none, without the roles: for
        a controller that has to leave before they stand."""
        timeline = self.timeline()
        on_disk = steps_of(timeline, DISK)
        for commit in timeline:
            if commit.step in on_disk:
                return
            try:
                self.begin_flush_from_here(commit.step)
            except SnapshotLost as error:
                LOGGER.warning("step %d could not be written to disk: %s", commit.step, error)
                continue
            self.is_flushed()
            self.commit()
            return

    def is_flushed(self, *, wait: bool = False) -> bool:
        """Whether all files of the flush under way are on disk; without one, False. What ends the
        flush is an OSError for what the disk refuses, a SnapshotLost for what memory holds no more."""
        flush = self._flush
        if flush is None or flush.synced is not None:
            return flush is not None
        synced = {}
        if flush.copied:
            for name, role in self.trained.items():
                ends = self._ends(role, wait=wait)
                if not ends:
                    return False
                for end in ends:
                    if end.error:
                        self._flush = None
                        refused = SnapshotLost if end.damaged else OSError
                        raise refused(f"{name}/{end.name}: {end.error}")
                    synced[f"{name}/{end.name}"] = {
                        "bytes": end.num_bytes,
                        "blake2b": end.blake2b,
                    }
        self._flush = replace(flush, synced=synced)
        return True

    def commit(self) -> Commit:
        """Makes the step that is on disk a checkpoint. An OSError for what the disk refuses."""
        flush, self._flush = self._flush, None
        assert flush is not None and flush.synced is not None
        self.check_fence()
        self.before_commit()
        checkpoint = self.store.commit(
            flush.step,
            flush.state,
            metrics=flush.metrics,
            sequence=max(flush.number, self.store.newest_sequence() + 1),
            synced=flush.synced,
        )
        return on_disk(checkpoint)

    def tidy(self) -> None:
        """Removes the temporary files of writers that were killed."""
        self.store.tidy()
        output = self.store.directory.parent
        (output / ROOM).unlink(missing_ok=True)
        for directory in (output, *output.glob("*/"), *output.glob("attempts/*/")):
            remove_drafts(directory)

    def give_up_flush(self) -> None:
        self._flush = None

    def _ends(self, role: TrainedRole, *, wait: bool) -> list[Flushed]:
        """How the copies of all ranks ended; empty while one is under way."""
        answers = each(role.flush_result, wait)
        return list(chain.from_iterable(answers)) if all(answers) else []

    # Going back.

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to go back to, not even something damaged."""
        return not self.commits() and not self.store.damaged()

    def commits(self) -> list[Commit]:
        """All commits of the run, the newest first. A checkpoint whose manifest is damaged is said
        in the log."""
        found: list[Commit] = [self.origin] if self.origin is not None else []
        if self.memory is not None:
            for staged in self.memory.commits():
                found.append(
                    Commit(
                        place=MEMORY,
                        path=staged.path,
                        step=staged.step,
                        number=staged.number,
                        stamp=staged.stamp,
                        state=staged.state,
                    )
                )
        for checkpoint in self.store.all():
            if checkpoint.sequence > self.begins_after:
                found.append(on_disk(checkpoint))
        return sorted(found, key=lambda commit: (commit.number, commit.place), reverse=True)

    def timeline(self) -> list[Commit]:
        """The newest commit and those that it follows, the newest first. Commits of later steps
        with lower numbers are of steps that were given up."""
        timeline: list[Commit] = []
        for commit in self.commits():
            same = [other for other in timeline if other.step == commit.step]
            is_new = all(other.place != commit.place for other in same)
            if is_new and (not timeline or commit.step <= timeline[-1].step):
                timeline.append(commit)
        return timeline

    def commit_of(self, step: int, place: str) -> Commit | None:
        """The step's commit there."""
        for commit in self.timeline():
            if (commit.step, commit.place) == (step, place):
                return commit
        return None

    def verified(self, commit: Commit) -> Commit:
        """The commit with its state, after everything that can be wrong with its files was looked
        for. A ValueError that names the file; FilesMissing where memory does not hold it any more."""
        if commit.place == DISK:
            return replace(commit, state=load_metadata(commit.path))
        for name, role in self.trained.items():
            directory = str(commit.path / name)
            checks = list(each(role.check_snapshot, directory, commit.stamp or ""))
            missing = [rank for rank, check in enumerate(checks) if check.is_missing]
            if missing:
                self.nodes.fetch(commit.path, name, missing)
                checks = list(each(role.check_snapshot, directory, commit.stamp or ""))
            for check in sorted(checks, key=lambda check: check.is_missing):
                if check.problem and check.is_missing:
                    raise FilesMissing(check.problem)
                if check.problem:
                    raise ValueError(check.problem)
        return commit

    def load(self, commit: Commit) -> None:
        """Brings every trained role to a verified commit."""
        loading = []
        for name, role in self.trained.items():
            directory = str(commit.path / name)
            if commit.stamp is None:
                loading.append(start(role.load_checkpoint, directory))
            else:
                loading.append(start(role.load_checkpoint, directory, commit.stamp))
        for ranks in loading:
            ranks.wait()
        self._number = max(self._number, commit.number, self.store.newest_sequence())
        self._staged, self._flush = None, None
        if commit.place == MEMORY:
            self._paths[commit.step] = commit.path
        self._committed = commit.path if commit.place == MEMORY else None

    def free_later(self, step: int) -> None:
        """Frees all nodes' memory of the steps after `step`, from which the run has gone back: they are
        written again, under the same names."""
        if self.memory is not None:
            paths = [commit.path for commit in self.timeline() if commit.place == MEMORY]
            paths = [path for path in paths if int(path.name.partition(".")[0]) <= step]
            self.nodes.free(self.memory.directory, paths or [self.memory.target(0)])

    def set_aside(self, commit: Commit) -> None:
        """Sees to it that nothing reads a damaged commit again; people may."""
        if commit.place == DISK:
            self.store.set_aside(commit.path)
        elif self.memory is not None:
            self.memory.withdraw_one(commit.path)

    def clear(self) -> None:
        """Frees the memory of all snapshots; checkpoints on disk stay."""
        if self.memory is None:
            return
        for role in self.trained.values():
            start(role.drop_snapshots).wait()
        self.memory.clear()
        self.nodes.free(self.memory.directory, ())
        self._staged = self._committed = None
        self._paths = {}

    def _next_number(self) -> int:
        in_memory = self.memory.commits()[:1] if self.memory is not None else []
        known = [self._number, self.store.newest_sequence()]
        known += [commit.number for commit in in_memory]
        self._number = max(known) + 1
        return self._number

    def check_fence(self) -> None:
        """Raises Fenced where a newer attempt has taken the run over."""
        if self.store.attempt is not None:
            self.store.attempt.check()


def checkpoint_at(path: Path) -> Commit:
    """The checkpoint of that directory, not verified yet. A ValueError where it is none."""
    try:
        return on_disk(read_checkpoint(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"checkpoint {path}: no {MANIFEST}, so this is no complete checkpoint"
        ) from error


def on_disk(checkpoint: Checkpoint) -> Commit:
    """A checkpoint as a commit, not verified yet."""
    return Commit(
        place=DISK,
        path=checkpoint.path,
        step=checkpoint.step,
        number=checkpoint.sequence,
        stamp=None,
        state={},
    )


def steps_of(commits: list[Commit], place: str) -> tuple[int, ...]:
    """The steps that have a commit there, oldest first."""
    return tuple(sorted(commit.step for commit in commits if commit.place == place))
