"""Saving: what a run can go on from, in memory and on disk, written and read.

A commit is the state of all trained roles after a step and what the controller knows of that step.
Both places hold the same files (hybridflow/snapshots). When to save is left out (loop.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from hybridflow.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointStore,
    load_metadata,
    read_checkpoint,
)
from hybridflow.group import each, start
from hybridflow.snapshots.files import Written
from hybridflow.snapshots.flush import Flushed
from hybridflow.snapshots.memory import MemoryPlace
from workers.roles import TrainedRole

LOGGER = logging.getLogger(__name__)
HUGGING_FACE = "huggingface"
"""Directory of a checkpoint with the model that the run is for."""
MEMORY, DISK = "memory", "disk"


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


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A checkpoint that is being written."""

    step: int
    number: int
    state: Mapping[str, Any]
    metrics: Mapping[str, float]
    flushes: bool
    """Hosts copy it from memory; otherwise they wrote it themselves."""


def nothing() -> None:
    pass


class Saving:
    """saving = Saving(trained, store, memory)
    written = saving.stage(7)                            # all ranks write their files into memory
    saving.commit_staged(7, state)                       # atomic: from here on step 7 can be restored
    saving.begin_checkpoint(7, state, metrics)           # copied to disk in the background
    saving.poll()                                        # commits it once it is there

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
        self._staged: tuple[int, Path, str] | None = None
        """Step, directory and stamp of the files that memory holds for the newest commit or the
        next."""
        self._committed: Path | None = None
        """The newest commit in memory."""
        self._flight: Flight | None = None
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
        self._check_fence()
        target = memory.target(step)
        stamp = f"{target.name}:{self._next_number()}"
        keep = () if self._committed is None else (str(self._committed),)
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
        """Makes the staged step the commit that a failure goes back to; frees older ones but the
        one before."""
        assert self.memory is not None and self._staged is not None and self._staged[0] == step
        self._check_fence()
        _, target, stamp = self._staged
        self.memory.commit(target, step=step, number=self._number, stamp=stamp, state=state)
        before, self._committed = self._committed, target
        self.memory.prune([path for path in (before, target) if path is not None])

    def begin_checkpoint(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        *,
        wait: bool,
        export: TrainedRole | None = None,
    ) -> None:
        """Begins a checkpoint of the state that the roles have. It is copied from memory in the
        background where that holds the step, and written by the ranks otherwise. One at a time:
        where the one before is not on disk yet, this one is skipped, unless `wait`, which returns
        when it is complete. `export`: a role that is also saved as a Hugging Face directory."""
        self.poll(wait=wait)
        if self._flight is not None:
            LOGGER.warning(
                "step %d gets no checkpoint: that of step %d is still being written; raise "
                "loop.checkpoint_every",
                step,
                self._flight.step,
            )
            return
        directory = self.store.begin(step)
        staged = self._staged is not None and self._staged[0] == step
        writing = []
        for name, role in self.trained.items():
            if staged:
                writing.append(start(role.flush_snapshot, str(directory)))
            else:
                writing.append(start(role.save_checkpoint, str(directory / name)))
        if export is not None:
            writing.append(start(export.save_pretrained, str(directory / HUGGING_FACE)))
        for ranks in writing:
            ranks.wait()
        number = self._number if staged else self._next_number()
        self._flight = Flight(
            step=step, number=number, state=state, metrics=dict(metrics), flushes=staged
        )
        self.poll(wait=wait or not staged)

    def poll(self, *, wait: bool = False) -> None:
        """Commits the checkpoint that is being written, if its files are on disk. What the disk
        refuses is said in the log, and an error with `wait`."""
        flight = self._flight
        if flight is None:
            return
        synced = {}
        if flight.flushes:
            for name, role in self.trained.items():
                ends = self._ends(role, wait=wait)
                if not ends:
                    return
                for end in ends:
                    if end.error:
                        self._failed(flight, f"{name}/{end.name}: {end.error}", wait=wait)
                        return
                    synced[f"{name}/{end.name}"] = {
                        "bytes": end.num_bytes,
                        "blake2b": end.blake2b,
                    }
        self._flight = None
        try:
            self.before_commit()
            self.store.commit(
                flight.step,
                flight.state,
                metrics=flight.metrics,
                sequence=max(flight.number, self.store.newest_sequence() + 1),
                synced=synced,
            )
        except OSError as error:  # a full or broken disk
            self._failed(flight, str(error), wait=wait)

    def write_newest(self) -> None:
        """Copies the newest snapshot to disk from this process, for a controller that has to leave
        at once. The files of all ranks must be on this node. Nothing where the disk has that
        commit or a newer one."""
        staged = next(iter(self.memory.commits()), None) if self.memory is not None else None
        newest = self.store.newest_sequence()
        if staged is None or staged.step == 0 or newest >= staged.number:
            return
        directory = self.store.begin(staged.step)
        for name in self.trained:
            shutil.copytree(staged.path / name, directory / name)
        self.store.commit(staged.step, staged.state, sequence=staged.number)

    def _ends(self, role: TrainedRole, *, wait: bool) -> list[Flushed]:
        """How the copies of all ranks ended; empty while one is under way."""
        answers = each(role.flush_result, wait)
        return list(chain.from_iterable(answers)) if all(answers) else []

    def _failed(self, flight: Flight, error: str, *, wait: bool) -> None:
        self._flight = None
        text = f"the checkpoint of step {flight.step} could not be written: {error}"
        if wait:
            raise RuntimeError(text)
        LOGGER.error("%s; the run goes on", text)

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

    def verified(self, commit: Commit) -> Commit:
        """The commit with its state, after everything that can be wrong with its files was looked
        for. A ValueError that names the file."""
        if commit.place == DISK:
            return replace(commit, state=load_metadata(commit.path))
        for name, role in self.trained.items():
            directory = str(commit.path / name)
            for problem in each(role.check_snapshot, directory, commit.stamp or ""):
                if problem:
                    raise ValueError(problem)
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
        self._staged, self._flight = None, None
        self._committed = commit.path if commit.place == MEMORY else None

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
        self._staged = self._committed = None

    def _next_number(self) -> int:
        in_memory = self.memory.commits()[:1] if self.memory is not None else []
        known = [self._number, self.store.newest_sequence()]
        known += [commit.number for commit in in_memory]
        self._number = max(known) + 1
        return self._number

    def _check_fence(self) -> None:
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
