"""Snapshots in the nodes' memory: they outlive every process of the run, not the node.

    /dev/shm/hybridflow-<uid>/<run>/            0700, checked to be ours
        owner.json                              whose memory this is
        00000007.2/                             step 7, written by attempt 2
            commit.json                         the controller's record, renamed into place last
            actor/0.safetensors                 a rank's file (files.py); on the rank's node
        00000006.2/                             the commit before, whose files the next step reuses

A rank writes into the memory of the file of two steps before, so that nothing is allocated in the
long run. A step is committed by its record, once all ranks have written; that of the step before
stays until then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybridflow.recovery.attempts import DIRECTORY, RUN, Attempt
from hybridflow.resharding.shards import LocalParameter
from hybridflow.snapshots.files import LENGTH_BYTES, Bound, Contents, Layout, boxes_of
from hybridflow.whole_file import whole_file

LOGGER = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")
RECORD, OWNER = "commit.json", "owner.json"
BEGUN_S = 60.0
"""How long a directory may be without its owner's name."""
KEPT_FRACTION, MOST_KEPT_BYTES = 0.25, 16_000_000_000
"""This fraction of the memory file system stays free, at most so many bytes: Ray's object store is
in it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCommit:
    """A snapshot in memory that is complete."""

    path: Path
    step: int
    number: int
    """Commits of memory and disk are counted together: the higher one is newer."""
    stamp: str
    """Stands in the files of all ranks."""
    state: dict[str, Any]
    """The state of data, algorithm and ledger, for the controller to go on from."""


class MemoryPlace:
    """The controller's side.

    memory = MemoryPlace.open(attempt)
    target = memory.target(7)                       # ranks write target/actor/0.safetensors, ...
    memory.commit(target, step=7, number=9, stamp="2.9", state={...})
    memory.commits()                                # the newest first
    """

    def __init__(self, directory: Path, attempt: int) -> None:
        self.directory = directory
        self._attempt = attempt

    @classmethod
    def open(cls, attempt: Attempt, root: Path = SHARED_MEMORY) -> MemoryPlace | None:
        """The place of the attempt's run; None, said in the log, where it can't be used. Removes
        the memory of runs whose output directory is gone."""
        output = attempt.directory.parent
        place = cls(memory_directory(output, attempt.run, root), attempt.number)
        of_user = place.directory.parent
        try:
            make_private(of_user)
            for other in of_user.iterdir():
                if other != place.directory and not _has_owner(other):
                    shutil.rmtree(other, ignore_errors=True)
            place.directory.mkdir(mode=0o700, exist_ok=True)
            owner = {"output_dir": str(output), "run": attempt.run, "files": _file_systems()}
            _replace(place.directory / OWNER, owner)
        except OSError as error:
            LOGGER.warning(
                "recovery.snapshot_every: no snapshots in memory, checkpoints on disk only: %s",
                error,
            )
            return None
        return place

    @classmethod
    def of(cls, output_dir: Path, root: Path = SHARED_MEMORY) -> MemoryPlace | None:
        """The place of the run in `output_dir`, for whoever reads it and has not claimed an attempt;
        None where there is no run."""
        file = output_dir.absolute() / DIRECTORY / RUN
        if not file.is_file():
            return None
        return cls(memory_directory(output_dir.absolute(), file.read_text(), root), 0)

    @classmethod
    def commits_of(cls, output_dir: Path, root: Path = SHARED_MEMORY) -> list[MemoryCommit]:
        """The commits in memory of the run in `output_dir`, the newest first; for whoever has not
        claimed an attempt."""
        place = cls.of(output_dir, root)
        return [] if place is None else place.commits()

    def target(self, step: int) -> Path:
        return self.directory / f"{step:08d}.{self._attempt}"

    def commit(
        self, target: Path, *, step: int, number: int, stamp: str, state: Mapping[str, Any]
    ) -> None:
        """Makes what the ranks wrote to `target` the newest commit, atomically."""
        target.mkdir(mode=0o700, exist_ok=True)
        record = {"step": step, "number": number, "stamp": stamp, "state": state}
        _replace(target / RECORD, record)

    def commits(self) -> list[MemoryCommit]:
        """The newest first; a damaged record is said in the log and left out."""
        commits = []
        for path in self.directory.glob(f"*/{RECORD}"):
            try:
                commits.append(MemoryCommit(path=path.parent, **json.loads(path.read_text())))
            except (ValueError, TypeError) as error:
                LOGGER.warning("snapshot %s is corrupt and not used: %s", path, error)
        return sorted(commits, key=lambda commit: commit.number, reverse=True)

    def withdraw(self, keep: Collection[Path]) -> None:
        """Uncommits all but `keep`: their files may be written over."""
        for path in self.directory.glob(f"*/{RECORD}"):
            if path.parent not in keep:
                path.unlink(missing_ok=True)

    def withdraw_one(self, target: Path) -> None:
        """Uncommits `target`."""
        (target / RECORD).unlink(missing_ok=True)

    def prune(self, keep: Collection[Path]) -> None:
        """Frees this node's memory of all but `keep`."""
        for path in self.directory.iterdir():
            if path.is_dir() and path not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Frees all of this node's memory of the run."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Stager:
    """A rank's side: writes a role's files into memory, over those that are not needed any more."""

    def __init__(self) -> None:
        self._buffers: dict[Path, Tensor] = {}
        """This process' files, mapped: uint8 [bytes]."""
        self._layout: Layout | None = None
        self._bound: dict[int, Bound] = {}
        """By the address of the buffer."""

    def contents(
        self, tensors: Sequence[LocalParameter], scalars: Mapping[str, int], stamp: str
    ) -> Contents:
        """A rank's file before it is written; its layout is that of the step before where the boxes are
        the same."""
        layout = self._layout
        if layout is None or layout.boxes != boxes_of(tensors):
            layout, self._bound = Layout(tensors), {}
        self._layout = layout
        return Contents(tensors, scalars, stamp, layout)

    def stage(self, path: Path, contents: Contents, keep: Collection[Path]) -> NDArray[np.uint64]:
        """Writes the file; returns Contents' digests. Files in the directories `keep`, and these
        themselves, stay as they are. An OSError where memory is short."""
        make_private(path.parents[3])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        spare = [held for held in self._buffers if held == path or held.parents[1] not in keep]
        spare.sort(key=lambda held: held != path)  # its own first: none is removed under its name
        buffer = None
        for held in spare:
            candidate = self._buffers.pop(held)
            if buffer is None and candidate.numel() == contents.num_bytes and held.exists():
                candidate[:LENGTH_BYTES].zero_()
                held.rename(path)
                buffer = candidate
            else:
                held.unlink(missing_ok=True)
        if buffer is None:
            buffer = allocate(path, contents.num_bytes, page_locked=contents.on_gpu)
        self._buffers[path] = buffer
        bound = self._bound.get(buffer.data_ptr())
        if bound is None or bound.header_bytes != contents.header_bytes:
            bound = Bound(buffer, contents.layout, contents.header_bytes)
        addresses = [other.data_ptr() for other in self._buffers.values()]
        self._bound = {at: other for at, other in self._bound.items() if at in addresses}
        self._bound[buffer.data_ptr()] = bound
        return contents.copy_to(buffer, bound)

    def clear(self) -> None:
        """Frees this role's files."""
        for path in self._buffers:
            path.unlink(missing_ok=True)
        self._buffers.clear()
        self._bound.clear()


def memory_directory(output_dir: Path, run: str, root: Path) -> Path:
    """Another one for another output directory, and for the same once it was removed."""
    name = hashlib.blake2b(f"{run} {output_dir}".encode(), digest_size=8).hexdigest()
    return root / f"hybridflow-{os.getuid()}" / f"{output_dir.name}-{name}"


class PageLockedFile(mmap.mmap):
    """A mapped file whose pages a GPU copies into directly, which is several times as fast as by way
    of the driver's own buffer."""

    address = 0
    """Where the page-locked memory begins; 0: none is."""

    def lock(self, memory: Tensor) -> None:
        """Page-locks `memory`, which is this file's. Said in the log where the driver refuses; copies
        are slower then, and right all the same."""
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if error == torch.cuda.cudart().cudaError.success:
            self.address = memory.data_ptr()
        else:
            LOGGER.warning(
                "snapshots in memory: %.3g GB could not be page-locked (%s); they take longer",
                memory.numel() / 1e9,
                error,
            )

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.address)


def allocate(path: Path, num_bytes: int, *, page_locked: bool = False) -> Tensor:
    """A new file, all of it reserved and mapped: uint8 [bytes]. An OSError where memory is short;
    a mapped file that is not reserved would end the process instead. `page_locked`: for copies from a
    GPU."""
    problem = shortage(path.parent, num_bytes)
    if problem:
        raise OSError(problem)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        file = PageLockedFile(descriptor, num_bytes)
        memory = torch.frombuffer(file, dtype=torch.uint8)
        if page_locked:
            file.lock(memory)
        return memory
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def shortage(directory: Path, num_bytes: int) -> str:
    """In words: that so many more bytes do not fit into the memory file system; empty where they do."""
    size = os.statvfs(directory)
    free, total = size.f_bavail * size.f_frsize, size.f_blocks * size.f_frsize
    kept = min(KEPT_FRACTION * total, MOST_KEPT_BYTES)
    if free - num_bytes >= kept:
        return ""
    return (
        f"{num_bytes / 1e9:.3g} GB are needed in {directory}, {free / 1e9:.3g} of "
        f"{total / 1e9:.3g} GB are free, and {kept / 1e9:.3g} GB must stay free; give /dev/shm more "
        "(docker run --shm-size=...)"
    )


def make_private(directory: Path) -> None:
    """A directory that only this user can enter. An OSError where it is someone else's."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(
            f"{directory} is not a directory that belongs to user {os.getuid()} alone; remove it"
        )


def _file_systems() -> str:
    """The file systems that this process sees: containers that share /dev/shm have others."""
    return str(Path("/proc/self/ns/mnt").readlink())


def _has_owner(directory: Path) -> bool:
    """Whether the run whose memory it is still has its output directory."""
    try:
        if not (directory / OWNER).exists():  # of a run that begins, perhaps
            return time.time() - directory.stat().st_mtime < BEGUN_S
        owner = json.loads((directory / OWNER).read_text())
        if owner.get("files", _file_systems()) != _file_systems():
            return True  # nobody can tell from here
        run = (Path(owner["output_dir"]) / DIRECTORY / RUN).read_text()
        return run == str(owner["run"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True  # not ours to judge


def _replace(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON so that the file is there completely or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value))
