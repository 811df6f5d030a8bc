"""What a run goes on from: memory before disk, past damage, after a death at every file operation;
and the ledger that proves it."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from controllers.ledger import LEDGER, first_difference, read_ledger
from controllers.recovery import Driver
from tests.controllers.hand_role import HandRole, make_loop, weights


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory of its own in the memory file system."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def undisturbed(tmp_path: Path, shm: Path, steps: int = 5) -> torch.Tensor:
    loop = make_loop(tmp_path / "undisturbed", shm, num_steps=steps)
    Driver(loop).run()
    return weights(loop)


def train(output: Path, shm: Path | None, steps: int) -> None:
    """So many steps with their snapshots and checkpoints, then a death."""
    loop = make_loop(output, shm)
    if loop.step == 0:
        loop.snapshot()
    for _ in range(steps):
        loop.train_one_step()
        loop.snapshot()
        if loop.step % 2 == 0:
            loop.begin_flush()
            assert loop.saving.is_flushed(wait=True)
            loop.saving.commit()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_goes_on_from_memory_before_disk_bit_for_bit(
    in_memory: bool, tmp_path: Path, shm: Path
) -> None:
    expected = undisturbed(tmp_path, shm)
    train(tmp_path / "cut", shm if in_memory else None, steps=3)
    loop = make_loop(tmp_path / "cut", shm)
    assert loop.step == (3 if in_memory else 2), "disk has every second step"
    Driver(loop).run()
    assert torch.equal(weights(loop), expected)
    if in_memory:
        first, second = (tmp_path / name / LEDGER for name in ("undisturbed", "cut"))
        assert first.read_bytes() == second.read_bytes()
    assert not list(shm.glob("*/cut-*")), "the run's memory is freed at its end"


def test_restore_in_place_goes_back_to_the_newest_commit(tmp_path: Path, shm: Path) -> None:
    expected = undisturbed(tmp_path, shm)
    loop = make_loop(tmp_path / "cut", shm)
    loop.restore()
    assert loop.step == 0, "nothing is committed yet: the start"
    loop.snapshot()
    for _ in range(3):
        loop.train_one_step()
        loop.snapshot()
    loop.train_one_step()  # is lost
    assert not loop.starts_from_scratch
    loop.restore()
    assert loop.step == 3 and loop.ledger.last is not None and loop.ledger.last["step"] == 3
    Driver(loop).run()
    assert torch.equal(weights(loop), expected)
    assert first_difference(tmp_path / "undisturbed" / LEDGER, tmp_path / "cut" / LEDGER) is None


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_validation_that_is_not_finite_stops_no_commit(
    in_memory: bool, tmp_path: Path, shm: Path
) -> None:
    """And comes back as it was."""
    diverged = {"loss": float("nan"), "perplexity": float("inf"), "reward/mean": -0.5}
    place = shm if in_memory else None
    loop = make_loop(tmp_path, place)
    loop.before = loop.after = diverged
    if in_memory:
        loop.snapshot()
    else:
        loop.checkpoint()
    resumed = make_loop(tmp_path, place)
    for numbers in (resumed.before, resumed.after):
        assert math.isnan(numbers["loss"])
        assert numbers | {"loss": 0.0} == diverged | {"loss": 0.0}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda step: flip(step / "actor/0.safetensors"), r"actor/0.safetensors is corrupt"),
    "cut": (
        lambda step: os.truncate(step / "actor/0.safetensors", 700),
        r"actor/0.safetensors has 700 bytes instead of",
    ),
    "missing": (
        lambda step: (step / "actor/0.safetensors").unlink(),
        r"actor/0.safetensors is missing",
    ),
    "manifest": (lambda step: flip(step / "manifest.json"), r"manifest.json is corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F13-R2: said in the log with the file's name; named explicitly it stays an error."""
    expected = undisturbed(tmp_path, shm)
    output = tmp_path / "cut"
    train(output, None, steps=5)
    newest = output / "checkpoints" / "step-00000004"
    act, message = DAMAGE[damage]
    if damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 2, "step')
    else:
        act(newest)
    with pytest.raises(ValueError, match=message):
        make_loop(output, None, resume=str(newest))
    with caplog.at_level(logging.WARNING):
        loop = make_loop(output, None)
    assert loop.step == 2 and str(newest) in caplog.text
    Driver(loop).run()
    assert torch.equal(weights(loop), expected)


def test_files_beside_a_checkpoints_own_are_not_read(tmp_path: Path, shm: Path) -> None:
    """macOS puts ._NAME beside every file that it copies; people keep copies."""
    expected = undisturbed(tmp_path, shm)
    train(tmp_path / "cut", None, steps=5)
    actor = tmp_path / "cut" / "checkpoints" / "step-00000004" / "actor"
    for name in ("._0.safetensors", "0 copy.safetensors", "notes.txt"):
        (actor / name).write_text("x")
    loop = make_loop(tmp_path / "cut", None)
    assert loop.step == 4
    Driver(loop).run()
    assert torch.equal(weights(loop), expected)


def test_nothing_but_damage_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    train(tmp_path, None, steps=2)
    flip(tmp_path / "checkpoints" / "step-00000002" / "actor" / "0.safetensors")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no commit of the run in .* can be read"):
            make_loop(tmp_path, None)
    assert make_loop(tmp_path, None, resume="never").step == 0


@pytest.mark.parametrize("damage", ["flipped", "header", "missing", "record"])
def test_a_damaged_snapshot_in_memory_falls_back_to_the_disk(
    damage: str, tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(tmp_path, shm)
    train(tmp_path / "cut", shm, steps=3)
    (newest,) = shm.glob("*/cut-*/00000003.1")
    file = newest / "actor" / "0.safetensors"
    if damage == "flipped":
        flip(file)
    elif damage == "header":
        with file.open("r+b") as opened:
            opened.write(bytes(8))
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "commit.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        loop = make_loop(tmp_path / "cut", shm)
    assert loop.step == 2 and str(newest) in caplog.text
    Driver(loop).run()
    assert torch.equal(weights(loop), expected)


def test_the_export_is_written_at_the_end_and_when_it_is_due(tmp_path: Path, shm: Path) -> None:
    """F13-R8."""
    loop = make_loop(tmp_path / "a", shm, checkpoint_every=1, keep_last=9)
    Driver(loop).run()
    role = loop.trained["actor"]
    assert isinstance(role, HandRole) and role.exports == 1
    assert (tmp_path / "a" / "checkpoints" / "step-00000005" / "huggingface").is_dir()
    often = make_loop(tmp_path / "b", None, checkpoint_every=1, export_every=2)
    Driver(often).run()
    role = often.trained["actor"]
    assert isinstance(role, HandRole) and role.exports == 3, "steps 2, 4 and the last"


def test_two_ledgers_are_compared_to_the_first_tensor(tmp_path: Path, shm: Path) -> None:
    undisturbed(tmp_path, shm)
    loop = make_loop(tmp_path / "other", shm)
    loop.snapshot()
    loop.train_one_step()
    loop.snapshot()
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    role.engine.tensor(1)[2, 1] += 1.0
    Driver(loop).run()
    first, second = (tmp_path / name / LEDGER for name in ("undisturbed", "other"))
    difference = first_difference(first, second)
    assert str(difference) == "step 2 differs in actor: model.w"
    lines = [json.loads(line) for line in second.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["rows"]["count"] for line in lines] == [0, 4, 4, 4, 4, 4]
    second.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]) + '{"step": 2, "ro')
    assert [line["step"] for line in read_ledger(second)] == [0, 1]
    assert str(first_difference(first, second)) == "step 2 differs in steps"


DYING = """
import os, sys
from pathlib import Path
import torch
import controllers.loop, hybridflow.disk
from controllers.recovery import Driver
from controllers.ledger import LEDGER, first_difference
from tests.controllers.hand_role import make_loop, weights
EVENTS = {"open", "shutil.rmtree", "mmap.__new__"}
EVENTS |= {f"os.{name}" for name in ("rename", "mkdir", "remove", "rmdir", "truncate", "link")}
root, shm, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.fsync = lambda descriptor: None  # for power cuts, not for kills; this is what takes the time
torch.set_num_threads(1)
SETTINGS = {"num_steps": 3, "checkpoint_every": 2}

def in_child(act):
    if not (child := os.fork()):
        code = 1
        try:
            code = act()
        finally:
            os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def undisturbed():
    loop = make_loop(root / "undisturbed", shm, **SETTINGS)
    Driver(loop).run()
    torch.save(weights(loop), root / "expected.pt")

def live(output, die_at):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event != "open" or str(root) in str(arguments[0]) or str(shm) in str(arguments[0])
        count += event in EVENTS and writes
        if 0 < die_at == count:
            os._exit(9)
    sys.addaudithook(hook)
    loop = make_loop(output, shm, **SETTINGS)
    Driver(loop).run()
    if not die_at:
        assert torch.equal(weights(loop), torch.load(root / "expected.pt"))
        difference = first_difference(root / "undisturbed" / LEDGER, output / LEDGER)
        assert difference is None, difference
    return 0

assert in_child(undisturbed) == 0
code, die_at, tried = 9, 1, 0
while code == 9:
    output = root / f"run-{die_at}"
    code = in_child(lambda: live(output, die_at))
    assert code in (0, 9), code
    again = in_child(lambda: live(output, 0))
    assert again == 0, (die_at, again)
    tried += 1
    die_at += stride
print(tried)
"""


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_death_at_every_file_operation_of_a_run(stride: int, tmp_path: Path, shm: Path) -> None:
    """F13 section D, crash at every action: memory commits, flushes, disk commits, ledger, attempts.
    The next controller's weights, moments and ledger are those of the undisturbed run."""
    run = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path), str(shm), str(stride)],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 60 / stride
