"""CheckpointStore: what is kept, what is refused, and that no kill at any moment loses the latest
checkpoint."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hybridflow.checkpoint import Best, Checkpoint, CheckpointStore, load_metadata


def save(store: CheckpointStore, step: int, **metrics: float) -> Checkpoint:
    directory = store.begin(step)
    (directory / "actor").mkdir()
    for rank in range(2):
        (directory / "actor" / f"rank{rank}.bin").write_bytes(
            random.Random(step).randbytes(1000 + rank)
        )
    return store.commit(step, {"step": step, "ledger": [1, 2, {"a": None}]}, metrics=metrics)


def steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.step for checkpoint in store.all()]


def test_a_commit_is_the_latest_and_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    assert store.latest() is None and store.best() is None
    checkpoint = save(store, 10, accuracy=0.5, kl=math.inf)
    assert (
        store.latest()
        == checkpoint
        == Checkpoint(
            path=checkpoint.path, step=10, sequence=1, metrics={"accuracy": 0.5, "kl": math.inf}
        )
    )
    assert load_metadata(checkpoint.path) == {"step": 10, "ledger": [1, 2, {"a": None}]}
    assert (tmp_path / "store" / "latest").read_text() == "step-00000010\n"
    assert (checkpoint.path / "actor" / "rank1.bin").read_bytes() == random.Random(10).randbytes(
        1001
    )


@pytest.mark.parametrize(("mode", "kept"), [(Best.max, [2, 4, 5]), (Best.min, [1, 4, 5])])
def test_the_last_and_the_best_are_kept(tmp_path: Path, mode: Best, kept: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1, metric="accuracy", mode=mode)
    for step, accuracy in enumerate([0.1, 0.9, math.nan, 0.5], start=1):
        save(store, step, accuracy=accuracy)
    save(store, 5)  # not validated at this step
    assert steps(store) == kept
    best = store.best()
    assert best is not None and best.step == kept[0]


def test_going_on_from_an_older_checkpoint_makes_the_rewritten_step_the_latest(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        save(store, step)
    again = save(store, 20)
    assert store.latest() == again and again.path.name == "step-00000020-2"
    assert steps(store) == [10, 30, 20]
    save(store, 40)
    assert steps(store) == [30, 20, 40] and not (tmp_path / "step-00000020").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: (path / "actor/rank1.bin").write_bytes(b"x" * 1001),
            r"actor/rank1.bin is corrupt",
        ),
        (
            lambda path: (path / "actor/rank1.bin").write_bytes(b"x" * 1000),
            r"actor/rank1.bin has 1000 bytes instead of 1001",
        ),
        (
            lambda path: (path / "actor/rank0.bin").unlink(),
            r"actor/rank0.bin is missing \(1 of 2 files\)",
        ),
        (lambda path: (path / "manifest.json").write_text('{"format'), r"manifest.json is corrupt"),
        (lambda path: (path / "manifest.json").unlink(), r"no complete checkpoint"),
        (
            lambda path: edit_manifest(path, metrics=None),
            r"corrupt \(metrics is of type NoneType\)",
        ),
        (lambda path: edit_manifest(path, files=[]), r"corrupt \(files is of type list\)"),
        (
            lambda path: edit_manifest(path, metadata={"step": 2}),
            r"corrupt \(its checksum differs\)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint = save(CheckpointStore(tmp_path), 1)
    damage(checkpoint.path)
    with pytest.raises(ValueError, match=message):
        load_metadata(checkpoint.path)


def edit_manifest(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def test_a_manifest_of_an_earlier_version_has_no_checksum(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1).path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert load_metadata(path)["step"] == 1


def test_what_people_put_beside_checkpoints_is_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Archives, copies and notes are neither read nor removed; of a checkpoint without a manifest the
    log speaks once."""
    store = CheckpointStore(tmp_path, keep_last=1)
    first = save(store, 1)
    theirs = [tmp_path / "step-00000009.tar.gz", tmp_path / "step-00000009"]
    theirs += [tmp_path / ".saving-1-step-00000002", tmp_path / ".deleting-notes"]
    for path in theirs:
        path.write_text("x")
    shutil.copytree(first.path, tmp_path / "step-00000001-before-the-change")
    (tmp_path / "step-00000007").mkdir()
    assert store.latest() == first and store.all() == [first]
    second = save(store, 2)
    assert store.all() == [second] and not first.path.exists()
    assert all(path.is_file() for path in theirs)
    assert load_metadata(tmp_path / "step-00000001-before-the-change")["step"] == 1
    assert caplog.text.count("step-00000007: no manifest.json; remove this directory") == 1
    assert store.damaged() == [tmp_path / "step-00000007"]


def test_bad_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"commit\(3\) without begin\(3\)"):
        store.commit(3, {})
    store.begin(3)
    for metadata in ({"pair": (1, 2)}, {"table": {1: 2}}, {"loss": math.nan}, {"path": tmp_path}):
        with pytest.raises(ValueError, match=f"metadata '{next(iter(metadata))}'"):
            store.commit(3, metadata)
    assert store.latest() is None


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(7) / "half").write_text("x")
    assert store.latest() is None
    save(store, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000008", "latest"}


SAVER = """
import sys
from pathlib import Path
from hybridflow.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep_last=1, keep_best=1, metric="score")
last = store.latest()
step = last.step if last else 0
while True:
    step += 1
    directory = store.begin(step)
    for name in range(20):
        (directory / str(name)).write_bytes(bytes([step % 256]) * 5000)
    store.commit(step, {"step": step}, metrics={"score": -abs(step % 7)})
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_the_latest_loadable(tmp_path: Path) -> None:
    generator = random.Random(0)
    store = CheckpointStore(tmp_path)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # it saves from here on
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        reported = [int(line) for line in process.stdout.read().split()]
        process.wait()
        latest = store.latest()
        assert latest is not None and latest.step >= max(reported, default=1)
        for checkpoint in store.all():
            assert load_metadata(checkpoint.path) == {"step": checkpoint.step}
            assert (checkpoint.path / "19").read_bytes() == bytes([checkpoint.step % 256]) * 5000


DYING_SAVER = """
import os, sys
from pathlib import Path
from hybridflow.checkpoint import CheckpointStore, load_metadata
EVENTS = {"open", "shutil.rmtree"}
EVENTS |= {f"os.{name}" for name in ("rename", "mkdir", "remove", "rmdir", "truncate", "scandir")}
root = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # for power cuts, not for kills; this is what takes the time

def save(step, die_at):
    store = CheckpointStore(root, keep_last=1)
    count = 0
    def hook(event, arguments):
        nonlocal count
        count += event in EVENTS
        if 0 < die_at == count:
            os._exit(9)
    sys.addaudithook(hook)
    directory = store.begin(step)
    for name in "ab":
        (directory / name).write_text(str(step))
    store.commit(step, {"step": step})
    os._exit(0)

def run(step, die_at):
    if not (child := os.fork()):
        save(step, die_at)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for checkpoint in CheckpointStore(root).all():
        assert load_metadata(checkpoint.path) == {"step": checkpoint.step}
        assert (checkpoint.path / "a").read_text() == str(checkpoint.step)
    return code, checkpoint.step

code, die_at = 9, 0
while code == 9:
    die_at += 1
    assert run(2 * die_at, 0) == (0, 2 * die_at)
    code, latest = run(2 * die_at + 1, die_at)
    assert latest - 2 * die_at in (0, 1)
assert code == 0 and latest == 2 * die_at + 1
print(die_at)
"""


def test_death_at_every_single_file_operation_leaves_the_latest_loadable(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", DYING_SAVER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20  # so many places to die were tried
