"""The driver over real snapshot files and checkpoints, in one process: full disks, notices,
determinism, the end of a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.chaos.full_disk import full, may_mount, mount, unmount
from controllers.ledger import LEDGER, first_difference
from controllers.loop import Loop
from controllers.recovery import Driver
from controllers.saving import OneNode, Saving
from hybridflow.disk import Disk, LineFile
from hybridflow.errors import NodeLeaves, TooFewDevices, Where, WorkerDied
from hybridflow.failures import EventLog
from hybridflow.local_pool import LocalPool
from hybridflow.metrics import MetricsConfig, Tracker, read_jsonl
from hybridflow.pool import Parts
from hybridflow.recovery.actions import Exit
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.results import Metrics
from tests.controllers.hand_role import HandAlgorithm, HandEngine, HandRole, make_loop, weights


class FullDisk(Disk):
    """Has no room for a manifest until it was asked `times` times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def write_synced(self, path: Path, text: str) -> None:
        if path.name == "manifest.json" and self.times:
            self.times -= 1
            raise OSError(28, "No space left on device")
        super().write_synced(path, text)


def with_disk(loop: Loop, disk: Disk) -> Loop:
    loop.store._disk = disk
    return loop


def test_a_full_disk_is_said_and_waited_for(
    tmp_path: Path, shm: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS C3, disk full: the run goes on in memory; the next snapshot is written instead, and
    the last one is tried again until the disk has room."""
    loop = with_disk(make_loop(tmp_path / "full", shm, checkpoint_every=1), FullDisk(3))
    with caplog.at_level(logging.WARNING):
        Driver(loop).run()
    assert caplog.text.count("could not be written to disk: [Errno 28]") == 3
    assert torch.equal(weights(loop), expected)
    assert loop.store.all()[-1].step == 5


def test_a_commit_that_the_disk_refuses_keeps_its_model(tmp_path: Path, shm: Path) -> None:
    """The last step's export is written once, and is in the commit that comes at last. Found by
    the simulation."""
    loop = with_disk(make_loop(tmp_path, shm, checkpoint_every=0), FullDisk(3))
    Driver(loop).run()
    (last,) = loop.store.all()
    assert (last.path / "huggingface").is_dir()


class NoExport(HandRole):
    """Its disk has no room for the model until it was asked `times` times."""

    times = 3

    def save_pretrained(self, directory: str) -> None:
        super().save_pretrained(directory)
        if self.times:
            self.times -= 1
            raise OSError(28, "No space left on device")


def test_an_export_that_the_disk_refuses_is_tried_again(
    tmp_path: Path, shm: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS C3, disk full: no process fails of it. Step 2's checkpoint comes without the model,
    the last one waits for it."""
    loop = make_loop(tmp_path / "full", shm, role=NoExport(), export_every=2)
    pools = {"main": Pool()}
    with caplog.at_level(logging.WARNING):
        Driver(loop, pools=pools, config=RecoveryConfig(), events=EventLog(tmp_path)).run()
    assert caplog.text.count("could not be exported: actor rank 0: [Errno 28]") == 3
    assert torch.equal(weights(loop), expected)
    exported = [(each.path / "huggingface").is_dir() for each in loop.store.all()]
    assert exported[-1] and [event["event"] for event in EventLog(tmp_path).read()] == ["started"]
    assert not list(loop.store.directory.glob(".*-step-*"))


def test_lines_wait_for_a_full_disk(tmp_path: Path) -> None:
    """Ledger, metrics and events: what does not fit is written later, in order, once."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted]).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        file = LineFile(mounted / "lines")
        for number in range(400):
            file.append(f"{number:0256d}")
        with pytest.raises(OSError, match="No space left"):
            file.write()
        subprocess.run(["mount", "-o", "remount,size=1m", mounted], check=True)
        file.append("end")
        lines = (mounted / "lines").read_text().splitlines()
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert lines == [*(f"{number:0256d}" for number in range(400)), "end"]


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path: Path, shm: Path) -> None:
    make_loop(tmp_path, shm)
    left = [tmp_path / "checkpoints" / f".{kind}-1-step-00000002" for kind in ("saving", "adding")]
    left.append(tmp_path / "checkpoints" / ".deleting-step-00000001")
    for directory in left:
        directory.mkdir(parents=True)
    names = (
        ".ledger.{}.writing.jsonl",
        ".config.{}.writing.yaml",
        "attempts/1/.holder.{}.writing.json",
    )
    writers = (999999999, os.getpid(), os.getppid())  # dead, of an earlier machine, and alive
    drafts = [tmp_path / name.format(pid) for name, pid in zip(names, writers, strict=True)]
    for draft in (*drafts, tmp_path / ".room"):
        draft.write_text("half")
    make_loop(tmp_path, shm)
    assert not any(path.exists() for path in (*left, *drafts[:2], tmp_path / ".room"))
    assert drafts[2].exists()


def test_a_disk_that_stays_full_ends_the_run_after_its_grace(tmp_path: Path, shm: Path) -> None:
    loop = with_disk(make_loop(tmp_path, shm), FullDisk(10**9))
    config = RecoveryConfig(max_restarts=0, disk_grace_s=0.5)
    with pytest.raises(RuntimeError, match=r"nothing could be written to disk .*disk_grace_s"):
        Driver(loop, config=config).run()
    again = make_loop(tmp_path, shm)
    assert again.step > 0, "its steps are in memory"
    Driver(again).run()
    assert again.store.all()[-1].step == 5


def test_a_last_step_in_memory_alone_reaches_the_disk(
    tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """A controller that dies between the last snapshot and its checkpoint is followed by one that
    writes it, with the model."""
    loop = make_loop(tmp_path / "cut", shm)
    loop.snapshot()
    for _ in range(5):
        loop.train_one_step()
        loop.snapshot()
    again = make_loop(tmp_path / "cut", shm)
    Driver(again).run()
    assert torch.equal(weights(again), expected)
    assert (again.store.all()[-1].path / "huggingface").is_dir()
    assert first_difference(tmp_path / "undisturbed" / LEDGER, again.ledger.path) is None


class Noticed(HandAlgorithm):
    """Step 4 is interrupted by the notice."""

    driver: Driver

    def step(self, prompts: object) -> Metrics:
        if self.role.engine.num_steps == 3:
            self.driver.leave()
            raise KeyboardInterrupt
        return super().step(prompts)  # type: ignore[arg-type]


def test_a_notice_puts_the_newest_snapshot_on_disk(
    tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """FAULTS trap 38: no step is waited for. Another machine, without this one's memory, goes on
    from the disk."""
    loop = make_loop(tmp_path / "cut", shm, checkpoint_every=0)
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    loop.algorithm = algorithm = Noticed(role)  # type: ignore[assignment]
    algorithm.driver = Driver(loop)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        algorithm.driver.run()
    assert time.monotonic() - started < 5.0
    assert [checkpoint.step for checkpoint in loop.store.all()] == [3]
    elsewhere = make_loop(tmp_path / "cut", None)
    assert elsewhere.step == 3
    Driver(elsewhere).run()
    assert torch.equal(weights(elsewhere), expected)


def test_a_notice_on_several_nodes_commits_nothing_that_is_incomplete(
    tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """FAULTS C3: the node of one of the files does not answer; another machine goes on from the
    checkpoint before, or from the start."""
    loop = make_loop(tmp_path / "cut", shm, checkpoint_every=2)
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    loop.algorithm = algorithm = Noticed(role)  # type: ignore[assignment]
    algorithm.driver = Driver(loop, nodes=Silent())
    with pytest.raises(KeyboardInterrupt):
        algorithm.driver.run()
    assert not {checkpoint.step for checkpoint in loop.store.all()} - {2}
    elsewhere = make_loop(tmp_path / "cut", None)
    Driver(elsewhere).run()
    assert torch.equal(weights(elsewhere), expected)


class Silent(OneNode):
    """Nodes that bring nothing."""

    def bring(self, source: Path, target: Path) -> None:
        target.mkdir()


class Pool(LocalPool):
    """Its restart builds nothing, or finds too few devices."""

    def __init__(self, *, too_few: bool = False) -> None:
        super().__init__()
        self.too_few = too_few

    def restarting(self) -> Parts:
        self.broken = ""
        if self.too_few:
            raise TooFewDevices("pool 'main': 2 devices could not be reserved")
        yield


class Dying(HandAlgorithm):
    """Dies once in the middle of step 4, whose replay leaves `drift` more in the weights."""

    drift = 0.0
    died = False
    error = WorkerDied
    after_flush = False
    """Step 4 begins when the files of the last checkpoint are on the disk."""

    def step(self, prompts: object) -> Metrics:
        if self.after_flush and self.role.engine.num_steps == 3:
            self.role._flusher.result(wait=True)
        if self.role.engine.num_steps == 4 and not self.died:
            self.died = True
            where = Where(role="actor", rank=0, method="update_actor", pool="main")
            raise self.error("actor rank 0 died", (where,))
        if self.died and self.role.engine.num_steps == 3:
            self.role.engine.tensor(1)[2, 1] += self.drift
        return super().step(prompts)  # type: ignore[arg-type]


def dying(output: Path, shm: Path, drift: float) -> Loop:
    """A run whose snapshot of step 4 is damaged when its step 5 dies: step 4 is replayed."""
    loop = make_loop(output, shm, checkpoint_every=0)
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    loop.algorithm = algorithm = Dying(role)  # type: ignore[assignment]
    algorithm.drift = drift
    return loop


class FullAndDying(HandAlgorithm):
    """Step 4 finds the disk full and dies; in step 5 there is room again, or the controller dies
    too."""

    directory: Path
    disk: ExitStack
    died = controller_dies = False

    def step(self, prompts: object) -> Metrics:
        if self.role.engine.num_steps == 3 and not self.died:
            self.died = True
            self.disk.enter_context(full(self.directory))
            where = Where(role="actor", rank=0, method="update_actor", pool="main")
            raise WorkerDied("actor rank 0 died", (where,))
        if self.role.engine.num_steps == 4:
            if self.controller_dies:
                raise KeyboardInterrupt
            self.disk.close()
        return super().step(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("controller_dies", [False, True])
def test_a_run_recovers_while_its_disk_is_full(
    controller_dies: bool, tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """The recovery's lines and cuts wait in memory. Steps 3 and 4 are known to the ledger after the
    death of the controller that held their lines: the commit in memory has them."""
    if not may_mount():
        pytest.skip("needs the right to mount a file system")
    output = tmp_path / "small"
    mount(output)
    try:
        loop = make_loop(output, shm, checkpoint_every=0)
        role = loop.trained["actor"]
        assert isinstance(role, HandRole)
        loop.tracker = Tracker(MetricsConfig(console=False), output, total_steps=5)
        loop.algorithm = algorithm = FullAndDying(role)  # type: ignore[assignment]
        algorithm.directory, algorithm.controller_dies = output, controller_dies
        with ExitStack() as algorithm.disk:
            driver = Driver(
                loop, pools={"main": Pool()}, config=RecoveryConfig(), events=EventLog(output)
            )
            if controller_dies:
                with pytest.raises(KeyboardInterrupt):
                    driver.run()
            else:
                driver.run()
                rows = read_jsonl(output / "metrics.jsonl")
                trace = (output / "trace.json").read_text().rstrip().rstrip(",")
                spans = [span["name"] for span in json.loads(trace + "]") if span["ph"] == "X"]
                steps = [name for name in spans if name.startswith("step ")]
                assert steps == ["step 1", "step 2", "step 3", "step 4", "step 5"]
                assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        if controller_dies:
            loop = make_loop(output, shm, checkpoint_every=0)
            assert loop.step == 4
            Driver(loop).run()
        assert torch.equal(weights(loop), expected)
        assert first_difference(tmp_path / "undisturbed" / LEDGER, loop.ledger.path) is None
        if not controller_dies:
            named = [event["event"] for event in EventLog(output).read()]
            assert named == ["started", "failure", "recovered"]
    finally:
        unmount(output)


class Damaging(Pool):
    """Its processes take the newest snapshot with them."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def restarting(self) -> Parts:
        yield from super().restarting()
        newest = self.loop.saving.commits()[0].path / "actor" / "0.safetensors"
        with newest.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\x07")


class Moving(Pool):
    """Its new processes are on another node, where nothing is of what the old ones held."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def restarting(self) -> Parts:
        yield from super().restarting()
        for commit in self.loop.saving.commits():
            if commit.place == "memory":
                shutil.rmtree(commit.path / "actor")
        role = self.loop.trained["actor"]
        assert isinstance(role, HandRole)
        role.engine, role.num_updates = HandEngine(), 0


class Peer(OneNode):
    """Another node, whose memory is a directory here."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory

    def copy(self, directory: Path, keep: Collection[Path]) -> None:
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.copytree(directory, self.memory / directory.name)

    def fetch(self, directory: Path, role: str, ranks: Collection[int]) -> None:
        assert (role, list(ranks)) == ("actor", [0])
        copy = self.memory / directory.name / role
        if copy.exists():
            shutil.copytree(copy, directory / role, dirs_exist_ok=True)


class Leaving(Dying):
    """Its node leaves where Dying dies."""

    error = NodeLeaves


@pytest.mark.parametrize("kind", [Dying, Leaving])
def test_memory_that_went_with_its_node_comes_from_another(
    kind: type[Dying], tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    loop = dying(tmp_path / "cut", shm, 0.0)
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    loop.algorithm = kind(role)  # type: ignore[assignment]
    events = EventLog(tmp_path)
    pools, peer = {"main": Moving(loop)}, Peer(tmp_path / "peer")
    Driver(loop, pools=pools, config=RecoveryConfig(), events=events, nodes=peer).run()
    assert torch.equal(weights(loop), expected)
    assert first_difference(tmp_path / "undisturbed" / LEDGER, loop.ledger.path) is None
    _, failure, recovered = events.read()
    assert failure["kind"] == ("node_lost" if kind is Leaving else "died")
    assert (recovered["source"], recovered["lost_steps"]) == ("memory", 1)


@pytest.mark.parametrize(("checkpoint_every", "source"), [(2, "disk"), (0, "start")])
def test_memory_that_went_with_its_node_is_lost_not_damaged(
    checkpoint_every: int, source: str, tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """FAULTS C3, node lost: the newest checkpoint on disk, or the run begins again; with damage it
    would end there."""
    loop = dying(tmp_path / "cut", shm, 0.0)
    loop.config = replace(loop.config, checkpoint_every=checkpoint_every)
    assert isinstance(loop.algorithm, Dying)
    loop.algorithm.after_flush = checkpoint_every > 0
    events = EventLog(tmp_path)
    Driver(loop, pools={"main": Moving(loop)}, config=RecoveryConfig(), events=events).run()
    assert torch.equal(weights(loop), expected)
    assert first_difference(tmp_path / "undisturbed" / LEDGER, loop.ledger.path) is None
    (recovered,) = [event for event in events.read() if event["event"] == "recovered"]
    assert recovered["source"] == source
    assert not list(loop.store.directory.glob("*damaged*"))


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_a_replayed_step_is_held_against_the_lost_one(
    drift: float, tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS C4.9: deterministic=true ends the run with the first tensor that differs."""
    loop = dying(tmp_path, shm, drift)
    events = EventLog(tmp_path)
    pools = {"main": Damaging(loop)}
    driver = Driver(loop, pools=pools, config=RecoveryConfig(), events=events, deterministic=True)
    if drift:
        with pytest.raises(RuntimeError, match=r"step 4 was replayed .* first in actor: model.w"):
            driver.run()
    else:
        driver.run()
        assert loop.step == 5
    named = {event["event"]: event for event in events.read()}
    assert (named["recovered"]["step"], named["recovered"]["source"]) == (3, "memory")
    assert ("replay_differs" in named) == bool(drift)


def test_too_few_devices_end_with_their_own_status(tmp_path: Path, shm: Path) -> None:
    """The scheduler starts the job again with another layout: it goes on from the commit."""
    loop = dying(tmp_path, shm, 0.0)
    driver = Driver(loop, pools={"main": Pool(too_few=True)}, config=RecoveryConfig())
    with pytest.raises(SystemExit) as ended:
        driver.run()
    assert ended.value.code == Exit.other_layout == 76
    assert make_loop(tmp_path, shm).step == 4


def test_a_notice_before_the_run_stands_puts_memory_on_disk(
    tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """The controller died, and its successor is told to leave while it still builds the roles."""
    loop = make_loop(tmp_path / "cut", shm)
    for _ in range(3):
        loop.train_one_step()
        loop.snapshot()
    saving = Saving({}, loop.store, loop.saving.memory)
    assert not saving.is_on_disk
    saving.write_newest()
    assert saving.is_on_disk
    assert [checkpoint.step for checkpoint in loop.store.all()] == [3]
    elsewhere = make_loop(tmp_path / "cut", None)
    assert elsewhere.step == 3
    Driver(elsewhere).run()
    assert torch.equal(weights(elsewhere), expected)
