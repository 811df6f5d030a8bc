"""A SIGTERM in the middle of every file operation of a save: the newest snapshot is on disk when the
controller leaves, and another machine goes on from it, to the last step with its model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LEAVING = """
import os, shutil, signal, sys, traceback
from pathlib import Path
import torch
from controllers.ledger import LEDGER, first_difference
from controllers.recovery import Driver
from hybridflow.recovery.actions import Exit
from hybridflow.supervision import leave_at_once
from tests.controllers.hand_role import make_loop, weights
EVENTS = {"open", "shutil.rmtree", "shutil.copytree", "mmap.__new__"}
EVENTS |= {f"os.{name}" for name in ("rename", "mkdir", "remove", "rmdir", "truncate", "link")}
root, shm, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.fsync = lambda descriptor: None  # for power cuts; this is what takes the time
torch.set_num_threads(1)
SETTINGS = {"num_steps": 3, "checkpoint_every": 2}

def in_child(act):
    if not (child := os.fork()):
        code = 1
        try:
            code = act()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def undisturbed():
    loop = make_loop(root / "undisturbed", shm, **SETTINGS)
    Driver(loop).run()
    torch.save(weights(loop), root / "expected.pt")

def live(output, notice_at):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event != "open" or str(root) in str(arguments[0]) or str(shm) in str(arguments[0])
        count += event in EVENTS and writes
        if count == notice_at:
            count += 1
            os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, leave_at_once)
    loop = make_loop(output, shm, **SETTINGS)
    driver = Driver(loop)
    sys.addaudithook(hook)
    driver.run()
    return 0

def newest_in_memory(output):
    steps = [-1]
    for record in shm.glob(f"hybridflow-*/{output.name}-*/*/commit.json"):
        steps.append(int(record.parent.name.partition(".")[0]))
    return max(steps)

def elsewhere(output, at_least):
    loop = make_loop(output, shm, **SETTINGS)  # the memory was emptied
    assert loop.step >= at_least, (loop.step, at_least)
    Driver(loop).run()
    assert torch.equal(weights(loop), torch.load(root / "expected.pt"))
    difference = first_difference(root / "undisturbed" / LEDGER, output / LEDGER)
    assert difference is None, difference
    last = loop.store.all()[-1]
    model = [path.name for path in (last.path / "huggingface").iterdir()]
    assert (last.step, model) == (3, ["config.json"])
    assert (output / "checkpoints" / "latest").read_text().strip() == last.path.name
    return 0

assert in_child(undisturbed) == 0
code, notice_at, tried = Exit.preempted, 1, 0
while code == Exit.preempted:
    output = root / f"run-{notice_at}"
    code = in_child(lambda: live(output, notice_at))
    assert code in (0, Exit.preempted), (notice_at, code)
    memory = newest_in_memory(output)
    for left in shm.glob(f"hybridflow-*/{output.name}-*"):
        shutil.rmtree(left)
    assert in_child(lambda: elsewhere(output, memory)) == 0, (notice_at, memory)
    tried += 1
    notice_at += stride
print(tried)
"""


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_notice_during_a_save_loses_no_committed_step(
    stride: int, tmp_path: Path, shm: Path
) -> None:
    """FAULTS C3, drain notice and SIGTERM: this machine's memory is gone afterwards, so what was
    committed there must be on disk."""
    run = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path), str(shm), str(stride)],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 60 / stride
