"""CheckpointStore: directories that are complete or do not exist, whenever the process dies.

Workers write any files into the directory that begin returns, and commit makes it a checkpoint.
Uploading is left out, and so is deciding when to save (controllers/loop.py).

On disk, for a store at outputs/ppo/checkpoints:

    step-00000020/                a checkpoint; its manifest.json was written last
    .saving-2-step-00000030/      being written by attempt 2, or left by its crash: never read, removed
                                  by the next begin of this attempt or a later one
    .adding-2-step-00000030/      what a later commit of that step adds to it (add)
    .deleting-step-00000010/      being removed
    damaged-step-00000040/        a checkpoint that could not be read, set aside
    latest                        name of the newest checkpoint, for people and scripts; not read here
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hybridflow.disk import DISK, Disk
from hybridflow.manifest import (
    FIX,
    FORMAT,
    MANIFEST,
    DamagedManifest,
    check_json,
    read_manifest,
    with_checksum,
)
from hybridflow.recovery.attempts import Attempt

LOGGER = logging.getLogger(__name__)
NAME = re.compile(r"step-\d+(-\d+)?")
"""Names of checkpoints."""
DRAFT = ".draft-"
"""How the name of a directory begins that is being added."""
_SAID: set[str] = set()
"""Lines on damaged checkpoints that the log has: every look at a run finds these again."""


class Best(StrEnum):
    max = "max"
    min = "min"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Checkpoint(path=Path("checkpoints/step-00000020"), step=20, sequence=2, metrics={"accuracy": 0.8})
    """

    path: Path
    step: int
    sequence: int
    """Number of the commit: the checkpoint with the higher number is newer, whatever its step."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class CheckpointStore:
    """One per run; any number of processes may read, one may save.

    store = CheckpointStore(Path("outputs/ppo/checkpoints"), keep_last=2, keep_best=1, metric="accuracy")
    directory = store.begin(20)
    actor.save(directory / "actor")               # every rank writes into it, on a shared file system
    store.commit(20, {"data_position": 640}, metrics={"accuracy": 0.8})

    checkpoint = store.latest()                   # None before the first commit
    metadata = load_metadata(checkpoint.path)     # verified, or a ValueError that names the broken file
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str = "",
        mode: Best = Best.max,
        disk: Disk = DISK,
        attempt: Attempt | None = None,
    ) -> None:
        """Keeps the newest `keep_last` and the `keep_best` with the best `metric` of those that
        have it (finite), by `mode`. disk: how files are synced and removed. `attempt`: once a newer
        one exists nothing is written any more (Fenced)."""
        if keep_last < 1:
            raise ValueError(
                f"checkpoint: keep_last is {keep_last}; keep at least 1, or the newest checkpoint "
                "would be deleted"
            )
        if keep_best < 0:
            raise ValueError(
                f"checkpoint: keep_best is {keep_best}; use 0 to keep none for its metric"
            )
        self.directory = directory.absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best if metric else 0
        self._metric = metric
        self._mode = mode
        self._disk = disk
        self.attempt = attempt

    def begin(self, step: int) -> Path:
        """An empty directory for the checkpoint of `step`; removes what this attempt and earlier
        ones have left unfinished. One save at a time."""
        if step < 0:
            raise ValueError(f"checkpoint: step is {step}; steps count from 0")
        self._check_fence()
        self.directory.mkdir(parents=True, exist_ok=True)
        # Whoever made the directory may have died before its name was on disk.
        self._disk.sync(self.directory.parent)
        self._remove_leftovers(but=self._adding(step))
        directory = self._saving(step)
        directory.mkdir()
        return directory

    def add(self, step: int, name: str) -> Path:
        """Where a directory `name` is written that the commit of `step` will hold once end_add was
        called, before or while another step is being saved."""
        self._check_fence()
        directory = self._adding(step)
        if directory.exists():
            self._disk.remove(directory)
        directory.mkdir(parents=True)
        return directory / f"{DRAFT}{name}"

    def end_add(self, step: int, name: str) -> None:
        """Everything of `name` is written."""
        directory = self._adding(step)
        (directory / f"{DRAFT}{name}").rename(directory / name)

    def remove_added(self, step: int) -> None:
        """Takes back what add(step) began."""
        self._disk.remove(self._adding(step))

    def tidy(self) -> None:
        """Removes what this attempt and earlier ones have left unfinished."""
        self._remove_leftovers()

    def _remove_leftovers(self, but: Path | None = None) -> None:
        for kind in ("saving", "adding", "deleting"):
            for leftover in directories(self.directory, f".{kind}-*"):
                if _attempt_of(leftover.name) <= self._number and leftover != but:
                    self._disk.remove(leftover)

    def commit(
        self,
        step: int,
        metadata: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        sequence: int | None = None,
        synced: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Checkpoint:
        """Makes the files written since begin(step) the latest checkpoint, atomically; then deletes
        the checkpoints that are not to be kept.

        `metadata` is plain JSON data and comes back equal. `sequence`: the number of the commit;
        by default one more than the newest checkpoint's. `synced`: size and digest, as in the
        manifest, of files that are on disk already; the others are read. Everything is on disk
        (fsync) before the name appears. Raises a ValueError without begin(step) or for other
        metadata.
        """
        self._check_fence()
        saving = self._saving(step)
        if not saving.is_dir():
            raise ValueError(
                f"checkpoint: commit({step}) without begin({step}); {saving} does not exist"
            )
        check_json(metadata)
        if sequence is None:
            sequence = max((checkpoint.sequence for checkpoint in self._scan()), default=0) + 1
        digests = dict(synced or {})
        names = sorted(set(_files(saving)) - {*digests, MANIFEST})
        digests |= self._disk.digests(saving, names, sync=True)
        # Moved last: where the disk refuses the rest, what was added is there for the next save.
        adding = self._adding(step)
        if adding.is_dir():
            names = [name for name in _files(adding) if not name.startswith(DRAFT)]
            digests |= self._disk.digests(adding, names, sync=True)
        numbers: dict[str, float | str] = {}
        for name, value in (metrics or {}).items():
            # JSON has no infinity.
            numbers[name] = value if math.isfinite(value) else repr(float(value))
        manifest = {
            "format": FORMAT,
            "step": step,
            "sequence": sequence,
            "metrics": numbers,
            "files": dict(sorted(digests.items())),
            "metadata": metadata,
        }
        path = self._free_name(step)
        self._disk.write_synced(saving / MANIFEST, json.dumps(with_checksum(manifest), indent=1))
        self._disk.write_synced(self.directory / ".latest", path.name + "\n")
        self._check_fence()
        if adding.is_dir():
            drafts = 0
            for added in list(adding.iterdir()):
                if added.name.startswith(DRAFT):
                    drafts += 1
                else:
                    added.rename(saving / added.name)
            if not drafts:  # their writers may still be at work
                self._disk.remove(adding)
        for directory in (saving, *saving.rglob("*")):
            if directory.is_dir():
                self._disk.sync(directory)
        self._check_fence()
        saving.rename(path)
        self._disk.sync(self.directory)
        (self.directory / ".latest").replace(self.directory / "latest")
        self._prune()
        return read_checkpoint(path)

    def settle(self) -> None:
        """Finishes a commit that was interrupted after its rename; pruning is left to the next."""
        draft, latest = self.directory / ".latest", self.latest()
        if latest is None:
            return
        self._disk.sync(self.directory)
        if draft.exists() and draft.read_text() == latest.path.name + "\n":
            draft.replace(self.directory / "latest")

    @contextmanager
    def trial(self) -> Iterator[Path]:
        """A directory to write into, then renamed and removed as a checkpoint's is. What the disk
        refuses is a ValueError."""
        saving, renamed = self.directory / ".saving-trial", self.directory / ".deleting-trial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in (saving, renamed):
                shutil.rmtree(leftover, ignore_errors=True)
            saving.mkdir()
            yield saving
            self._disk.write_synced(saving / MANIFEST, "{}")
            saving.rename(renamed)
            self._disk.sync(self.directory)
            shutil.rmtree(renamed)
        except OSError as error:
            raise ValueError(
                f"output_dir: no checkpoint can be written to {self.directory} ({error}); choose "
                "another output_dir"
            ) from error
        finally:
            shutil.rmtree(saving, ignore_errors=True)

    def check_space(self, num_bytes: int) -> None:
        """ValueError where the disk has not `num_bytes`, those of a checkpoint, to spare."""
        free = shutil.disk_usage(self.directory).free
        if num_bytes > free:
            raise ValueError(
                f"output_dir: a checkpoint takes {num_bytes / 1e9:.3g} GB (weights, optimizer and "
                f"export), and {free / 1e9:.3g} GB are free in {self.directory}; free some, or "
                "choose another output_dir"
            )

    def all(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first, one per step."""
        newest = {checkpoint.step: checkpoint for checkpoint in self._scan()}
        return sorted(newest.values(), key=lambda checkpoint: checkpoint.sequence)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        return max(self._scan(), key=lambda checkpoint: checkpoint.sequence, default=None)

    def newest_sequence(self) -> int:
        """The number of the newest commit; 0 before the first."""
        latest = self.latest()
        return latest.sequence if latest else 0

    def best(self) -> Checkpoint | None:
        """The checkpoint with the best metric, the older of two equals; None where no
        checkpoint has the metric."""
        return next(iter(self._ranked()), None)

    def _ranked(self) -> list[Checkpoint]:
        """The checkpoints with a finite metric, best first."""
        sign = 1 if self._mode is Best.min else -1
        ranked = []
        for checkpoint in self.all():
            value = checkpoint.metrics.get(self._metric, math.nan)
            if math.isfinite(value):
                ranked.append((sign * value, checkpoint.sequence, checkpoint))
        ranked.sort(key=lambda entry: entry[:2])
        return [checkpoint for *_, checkpoint in ranked]

    def _scan(self) -> list[Checkpoint]:
        """Every directory with a readable manifest, oldest first. The log says once of each other
        one what is wrong with it."""
        checkpoints = []
        for path in self._named():
            try:
                checkpoints.append(read_checkpoint(path))
            except FileNotFoundError:
                if path.is_dir():  # otherwise the saving process deleted it meanwhile
                    _say(f"checkpoint {path}: no {MANIFEST}; {FIX}")
            except DamagedManifest as error:
                _say(str(error))
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.sequence)

    def _named(self) -> list[Path]:
        """The directories with names of checkpoints. Archives and copies that people make beside them
        are theirs."""
        paths = directories(self.directory, "step-*")
        return [path for path in paths if NAME.fullmatch(path.name)]

    def set_aside(self, path: Path) -> None:
        """Renames a checkpoint that could not be read, so that nothing reads it again; people may."""
        self._check_fence()
        target, number = path.with_name(f"damaged-{path.name}"), 1
        while target.exists():  # another timeline's checkpoint of this step was damaged too
            number += 1
            target = path.with_name(f"damaged-{path.name}-{number}")
        path.rename(target)
        self._disk.sync(self.directory)

    def damaged(self) -> list[Path]:
        """Checkpoints that were set aside, and those whose manifest is missing or damaged."""
        readable = {checkpoint.path for checkpoint in self._scan()}
        paths = [*self._named(), *directories(self.directory, "damaged-*")]
        return [path for path in paths if path not in readable]

    def would_be_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be the best; the first one with a finite
        metric is."""
        value = metrics.get(self._metric, math.nan)
        if not self._keep_best or not math.isfinite(value):
            return False
        best = self.best()
        if best is None:
            return True
        sign = 1 if self._mode is Best.min else -1
        return sign * value < sign * best.metrics[self._metric]

    def _check_fence(self) -> None:
        if self.attempt is not None:
            self.attempt.check()

    @property
    def _number(self) -> int:
        return self.attempt.number if self.attempt is not None else 0

    def _prune(self) -> None:
        retained = (*self.all()[-self._keep_last :], *self._ranked()[: self._keep_best])
        paths = {checkpoint.path for checkpoint in retained}
        for checkpoint in self._scan():
            if checkpoint.path not in paths:
                # A directory named step-... is always whole: the removal, which takes time, happens
                # under another name.
                doomed = self.directory / f".deleting-{checkpoint.path.name}"
                checkpoint.path.rename(doomed)
                self._disk.remove(doomed)

    def _saving(self, step: int) -> Path:
        return self.directory / f".saving-{self._number}-step-{step:08d}"

    def _adding(self, step: int) -> Path:
        return self.directory / f".adding-{self._number}-step-{step:08d}"

    def _free_name(self, step: int) -> Path:
        """step-00000020, or step-00000020-2 where the step was saved before, by a run that was
        then resumed from an older checkpoint."""
        path, number = self.directory / f"step-{step:08d}", 1
        while path.exists():
            number += 1
            path = self.directory / f"step-{step:08d}-{number}"
        return path


def directories(parent: Path, pattern: str) -> list[Path]:
    """Those in `parent` whose names match; no files."""
    return [path for path in parent.glob(pattern) if path.is_dir()]


def _say(line: str) -> None:
    if line not in _SAID:
        _SAID.add(line)
        LOGGER.warning("%s", line)


def _files(directory: Path) -> list[str]:
    """All files below, by relative name."""
    names = []
    for path in directory.rglob("*"):
        if path.is_file():
            names.append(str(path.relative_to(directory)))
    return sorted(names)


def load_metadata(path: Path, disk: Disk = DISK) -> dict[str, Any]:
    """The metadata of the checkpoint at `path`, after every file was compared with its size and
    digest in the manifest."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"checkpoint {path}: no {MANIFEST}, so this is no complete checkpoint"
        ) from error
    files: dict[str, dict[str, Any]] = manifest["files"]
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {path}: {missing[0]} is missing ({len(missing)} of {len(files)} files); "
            f"{FIX}"
        )
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"checkpoint {path}: {name} has {size} bytes instead of {expected['bytes']}; {FIX}"
            )
    for name, digest in disk.digests(path, list(files), sync=False).items():
        if digest != files[name]:
            raise ValueError(
                f"checkpoint {path}: {name} is corrupt, its digest differs from the manifest; {FIX}"
            )
    metadata: dict[str, Any] = manifest["metadata"]
    return metadata


def _attempt_of(name: str) -> int:
    """The attempt that a directory .saving-2-step-00000030 belongs to; 0 where it says none."""
    _, number, *_ = name.split("-")
    return int(number) if number.isdigit() else 0


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a directory, by its manifest; its files are not looked at. A
    FileNotFoundError without a manifest, a DamagedManifest for one that is not what was written."""
    manifest = read_manifest(path)
    metrics = {name: float(value) for name, value in manifest["metrics"].items()}
    return Checkpoint(
        path=path, step=manifest["step"], sequence=manifest["sequence"], metrics=metrics
    )
