"""The ledger and checkpoints on disks that forget, tear, or are full; found by the simulation of
tests/recovery (F13 section D)."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.ledger import Ledger, Rows, read_ledger
from controllers.saving import Saving
from hybridflow.checkpoint import CheckpointStore
from hybridflow.disk import Disk


def ledger_of(path: Path, steps: int) -> Ledger:
    ledger = Ledger(path)
    for step in range(steps):
        ledger.append(ledger.next(step, Rows(), {"row": 4 * step}, {}))
    return ledger


@pytest.mark.parametrize("damage", ["bit", "cut", "bytes", "other line"])
def test_a_ledger_that_a_power_cut_damaged_goes_on_from_the_commit(
    damage: str, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = ledger_of(path, 5)
    whole = read_ledger(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = {
        "bit": lines[3].replace(b"12", b"13", 1),
        "cut": lines[3][:20],
        "bytes": b"\xff\x00" + lines[3][2:],
        "other line": lines[2],
    }[damage]
    path.write_bytes(b"".join(lines))
    assert read_ledger(path) == whole[:3]
    ledger.rewind(whole[3])  # the commit's own line
    assert read_ledger(path) == whole[:4]
    ledger.append(ledger.next(4, Rows(), {"row": 16}, {}))
    assert read_ledger(path) == whole


class Watched(Disk):
    """Says what was synced when a manifest is written, and then that the disk is full."""

    def __init__(self) -> None:
        self.full = True

    def write_synced(self, path: Path, text: str) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().write_synced(path, text)


def test_a_full_disk_at_a_commit_is_said_and_the_next_checkpoint_is_written(
    tmp_path: Path,
) -> None:
    disk = Watched()
    store = CheckpointStore(tmp_path / "checkpoints", disk=disk)
    saving = Saving({}, store)
    synced: list[int] = []
    saving.before_commit = lambda: synced.append(len(store.all()))
    saving.begin_flush(1, {}, {})
    assert saving.is_flushed()
    with pytest.raises(OSError, match=r"No space left on device"):
        saving.commit()
    disk.full = False
    saving.begin_flush(2, {}, {})
    assert saving.is_flushed()
    saving.commit()
    assert [checkpoint.step for checkpoint in store.all()] == [2]
    assert synced == [0, 0], "the ledger is synced before each commit"
