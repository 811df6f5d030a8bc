"""The last commit of a run: it ends with its model on disk, and with nothing that was damaged in memory,
whenever a notice comes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from controllers.ledger import LEDGER, first_difference
from controllers.recovery import Driver
from hybridflow.disk import Disk
from hybridflow.results import Metrics
from tests.controllers.hand_role import HandAlgorithm, HandRole, make_loop, weights


class NoticeAfterCommit(Disk):
    """A notice comes as soon as step 5 has its name."""

    driver: Driver
    came = False

    def sync(self, directory: Path) -> None:
        super().sync(directory)
        if not self.came and any(directory.glob("step-00000005")):
            self.came = True
            self.driver.leave()
            raise KeyboardInterrupt


class NoticeInExport(HandRole):
    """Its disk refuses the last step's model once; the notice comes when half of it is written."""

    def export_model(self, directory: str) -> str:
        self.exports += 1
        if self.exports == 1:
            return "No space left on device"
        Path(directory).mkdir()
        self.driver.leave()
        raise KeyboardInterrupt

    driver: Driver


@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize("in_export", [True, False])
def test_a_notice_at_the_end_leaves_a_run_whose_model_is_exported_once(
    in_export: bool, same_machine: bool, tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    """What the first controller commits is whole, or without a model, which the next one adds, on
    a machine without this one's memory too; a third one finds nothing to do. Found by the
    simulation."""
    output, settings = tmp_path / "cut", {"checkpoint_every": 0}
    role = NoticeInExport() if in_export else HandRole()
    loop = make_loop(output, shm, role=role, **settings)
    driver = Driver(loop)
    if isinstance(role, NoticeInExport):
        role.driver = driver
    else:
        loop.store._disk = disk = NoticeAfterCommit()
        disk.driver = driver
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    (left,) = loop.store.all()
    assert left.step == 5 and (left.path / "huggingface").is_dir() == (not in_export)
    for exports in (int(in_export), 0):
        again = make_loop(output, shm if same_machine else None, **settings)
        Driver(again, deterministic=True).run()
        role = again.trained["actor"]
        assert isinstance(role, HandRole) and role.exports == exports
        (last,) = again.store.all()
        assert [path.name for path in (last.path / "huggingface").iterdir()] == ["config.json"]
        assert (output / "checkpoints" / "latest").read_text().strip() == last.path.name
        assert torch.equal(weights(again), expected)
    assert first_difference(tmp_path / "undisturbed" / LEDGER, again.ledger.path) is None


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-3, 2)
        (byte,) = opened.read(1)
        opened.seek(-3, 2)
        opened.write(bytes([byte ^ 1]))


class FlippedInMemory(HandRole):
    """A bit of the last step's snapshot flips before it is copied to the disk."""

    flips = 0

    def flush_snapshot(self, directory: str) -> None:
        if self.engine.num_steps == 5 and not self.flips:
            self.flips += 1
            assert self._staged is not None
            flip_a_bit(self._staged)
        super().flush_snapshot(directory)


def test_a_snapshot_that_was_damaged_in_memory_is_not_committed(
    tmp_path: Path, shm: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its copy's digests say so; the roles still hold the step: it is staged again, and counts as
    the same step."""
    role = FlippedInMemory()
    loop = make_loop(tmp_path / "cut", shm, role=role, checkpoint_every=0)
    with caplog.at_level(logging.WARNING):
        Driver(loop, deterministic=True).run()
    assert role.flips == 1 and "is corrupt, its digest differs" in caplog.text
    elsewhere = make_loop(tmp_path / "cut", None)
    assert elsewhere.step == 5 and torch.equal(weights(elsewhere), expected)
    assert (elsewhere.store.all()[-1].path / "huggingface").is_dir()
    assert first_difference(tmp_path / "undisturbed" / LEDGER, elsewhere.ledger.path) is None


class NoticedAndFlipped(HandAlgorithm):
    """A bit of step 3's snapshot flips; then step 4 is interrupted by a notice."""

    driver: Driver

    def step(self, prompts: object) -> Metrics:
        if self.role.engine.num_steps == 3:
            assert self.role._staged is not None
            flip_a_bit(self.role._staged)
            self.driver.leave()
            raise KeyboardInterrupt
        return super().step(prompts)  # type: ignore[arg-type]


def test_a_notice_leaves_with_the_newest_snapshot_that_is_whole(
    tmp_path: Path, shm: Path, expected: torch.Tensor
) -> None:
    loop = make_loop(tmp_path / "cut", shm, checkpoint_every=0)
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    loop.algorithm = algorithm = NoticedAndFlipped(role)  # type: ignore[assignment]
    algorithm.driver = Driver(loop)
    with pytest.raises(KeyboardInterrupt):
        algorithm.driver.run()
    assert [checkpoint.step for checkpoint in loop.store.all()] == [2]
    elsewhere = make_loop(tmp_path / "cut", None)
    Driver(elsewhere).run()
    assert torch.equal(weights(elsewhere), expected)
