"""Snapshots in memory and their way to disk: buffers, records, owners, and what is said when memory
is short."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch

from hybridflow.recovery.attempts import Attempt, Fenced
from hybridflow.snapshots.files import Contents, file_name
from hybridflow.snapshots.flush import Flusher
from hybridflow.snapshots.memory import MemoryPlace, Stager, allocate, make_private, shortage
from hybridflow.snapshots.reading import SnapshotFiles
from tests.snapshots.layouts import parts, whole_tensors


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory of its own in the memory file system."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def open_place(tmp_path: Path, shm: Path) -> MemoryPlace:
    place = MemoryPlace.open(Attempt.claim(tmp_path / "out"), root=shm)
    assert place is not None
    return place


def stage(place: MemoryPlace, stager: Stager, step: int, keep: list[Path]) -> Path:
    contents = Contents(parts(whole_tensors(step), "rows", 0, 1), {"num_steps": step}, str(step))
    path = place.target(step) / "actor" / file_name(0)
    stager.stage(path, contents, keep)
    return path


def test_two_buffers_are_used_in_turn_and_the_older_commit_stays(tmp_path: Path, shm: Path) -> None:
    place, stager = open_place(tmp_path, shm), Stager()
    inodes, keep = [], []
    for step in range(5):
        place.withdraw(keep)
        path = stage(place, stager, step, keep)
        before = place.commits()
        assert [commit.step for commit in before] == ([step - 1] if step else [])
        place.commit(place.target(step), step=step, number=step, stamp=str(step), state={"a": 1})
        place.prune([*keep, place.target(step)])
        keep = [place.target(step)]
        inodes.append(path.stat().st_ino)
        newest = place.commits()[0]
        assert (newest.step, newest.state) == (step, {"a": 1})
        files = SnapshotFiles(newest.path / "actor", newest.stamp)
        assert torch.equal(
            files.whole("model.norm.weight"), whole_tensors(step)["model.norm.weight"]
        )
    assert inodes[0] == inodes[2] == inodes[4] and inodes[1] == inodes[3] != inodes[0]
    assert shm.joinpath(f"hybridflow-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_an_output_directory_that_is_gone_leaves_no_memory_behind(
    tmp_path: Path, shm: Path
) -> None:
    place = open_place(tmp_path, shm)
    place.commit(place.target(3), step=3, number=3, stamp="3", state={})
    again = open_place(tmp_path, shm)
    assert again.directory == place.directory and len(again.commits()) == 1
    assert [commit.step for commit in MemoryPlace.commits_of(tmp_path / "out", shm)] == [3]
    shutil.rmtree(tmp_path / "out")
    anew = open_place(tmp_path, shm)
    assert anew.directory != place.directory and anew.commits() == []
    assert not place.directory.exists()


def test_memory_that_may_be_a_live_runs_stays(tmp_path: Path, shm: Path) -> None:
    """That of a run that has not written its name yet, and that of another container, whose output
    directories this one does not see."""
    place = open_place(tmp_path, shm)
    begun, elsewhere = (place.directory.with_name(name) for name in ("begun", "elsewhere"))
    begun.mkdir()
    elsewhere.mkdir()
    owner = {"output_dir": str(tmp_path / "unseen"), "run": "1", "files": "mnt:[1]"}
    (elsewhere / "owner.json").write_text(json.dumps(owner))
    open_place(tmp_path, shm)
    assert begun.exists() and elsewhere.exists()
    os.utime(begun, (0, 0))
    open_place(tmp_path, shm)
    assert not begun.exists() and elsewhere.exists()


def test_memory_that_is_someone_elses_is_not_used(
    tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shm / f"hybridflow-{os.getuid()}"
    directory.mkdir(parents=True, mode=0o777)
    directory.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a directory that belongs to user"):
        make_private(directory)
    with caplog.at_level(logging.WARNING):
        assert MemoryPlace.open(Attempt.claim(tmp_path / "out"), root=shm) is None
    assert "no snapshots in memory, checkpoints on disk only" in caplog.text


def test_too_little_memory_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"GB are needed in .*; give /dev/shm more"):
        allocate(tmp_path / "file", 10**17)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("total_gb", "free_gb", "needed_gb", "fits"),
    [
        (271, 65.7, 0.002, True),  # a disk in place of memory, fuller than three quarters
        (24, 8, 1.9, True),
        (24, 8, 2.1, False),  # a quarter of it, 6 GB, would not stay free
        (271, 65.7, 50, False),  # nor 16 GB
    ],
)
def test_what_stays_free(
    total_gb: float,
    free_gb: float,
    needed_gb: float,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = {"f_frsize": 4096, "f_blocks": total_gb * 1e9 / 4096, "f_bavail": free_gb * 1e9 / 4096}
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(**blocks))
    said = shortage(Path("/somewhere"), int(needed_gb * 1e9))
    assert (said == "") is fits
    assert fits or f"{min(total_gb / 4, 16):.3g} GB must stay free" in said


def test_a_damaged_record_is_left_out(
    tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = open_place(tmp_path, shm)
    for step in (1, 2):
        place.commit(place.target(step), step=step, number=step, stamp="x", state={})
    (place.target(2) / "commit.json").write_text('{"step": 2')
    assert [commit.step for commit in place.commits()] == [1]
    assert "commit.json is corrupt and not used" in caplog.text


def test_a_flush_copies_and_hashes_and_can_be_given_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(20 << 20))
    flusher = Flusher()
    flusher.start(source, tmp_path / "disk" / "0.safetensors")
    expected = source.read_bytes()
    source.unlink()  # the name may go, the contents are read to the end
    result = flusher.result(wait=True)
    assert result is not None and not result.error and result.num_bytes == len(expected)
    assert (tmp_path / "disk" / "0.safetensors").read_bytes() == expected
    assert result.blake2b == hashlib.blake2b(expected).hexdigest()[:32]
    source.write_bytes(expected)
    (tmp_path / "file").write_text("in the way")
    flusher.start(source, tmp_path / "file" / "0.safetensors")
    result = flusher.result(wait=True)
    assert result is not None and "file" in result.error
    flusher.start(source, tmp_path / "third")
    flusher.give_up()
    assert flusher.source is None


def test_a_newer_attempt_fences_the_older(tmp_path: Path) -> None:
    """F13-R1, section C5."""
    first = Attempt.claim(tmp_path)
    first.check()
    second = Attempt.claim(tmp_path)
    assert (first.number, second.number, first.run) == (1, 2, second.run)
    second.check()
    with pytest.raises(Fenced, match="attempt 2 has taken this run over; attempt 1 ends"):
        first.check()
