"""How a command ends that was interrupted, or whose run another controller took over."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.checkpoint import CheckpointStore
from hybridflow.metrics.console import _verdict
from hybridflow.metrics.curves import Curve, _draw
from hybridflow.metrics.samples import Sample
from hybridflow.recovery.attempts import Attempt, Fenced
from recipes.config import RunConfig
from recipes.errors import plain_errors
from recipes.interruption import what_is_kept
from recipes.report.charts import labels
from workers import hub


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KeyboardInterrupt goes on, so that the process ends by the signal; its stack is not shown."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyboardInterrupt) as caught, plain_errors(interrupted=lambda: "at step 3"):
        raise KeyboardInterrupt
    sys.excepthook(KeyboardInterrupt, caught.value, None)
    assert capsys.readouterr().err == "at step 3\n"


def test_a_run_that_was_taken_over_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = Attempt.claim(tmp_path)
    Attempt.claim(tmp_path)
    with pytest.raises(SystemExit) as ended, plain_errors():
        attempt.check()
    assert ended.value.code == 1 and not isinstance(ended.value.__cause__, Fenced)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: output_dir=") and "attempt 2 has taken this run over" in line


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path))
    assert what_is_kept(config) == "interrupted before the first step; nothing is kept"
    (tmp_path / "ledger.jsonl").write_text("")
    row = (
        '{{"step": {}, "split": "train", "time_s": 1, "seconds/step": 2.0, "tokens_per_s": 5.0}}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(row.format(6) + row.format(7))
    assert what_is_kept(config) == (
        "interrupted after step 7; nothing is kept, the same command starts anew"
    )
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.begin(5) / "weights").write_text("1")
    store.commit(5, {"step": 5})
    path = tmp_path / "checkpoints" / "step-00000005"
    assert what_is_kept(config) == (
        f"interrupted after step 7; the checkpoint of step 5 ({path}) is kept: the same command "
        "goes on from there"
    )


def test_labels_of_an_axis_differ() -> None:
    assert labels([5.55, 5.5505, 5.551]) == ["5.55", "5.5505", "5.551"]
    assert labels([0.0, 1.0, 2.0]) == ["0", "1", "2"]


def test_weights_without_a_version_are_not_shown() -> None:
    sample = Sample(
        prompt="2+3=",
        response="5",
        scores={"reward": 1.0},
        finish_reason="stop",
        weight_version=-1,
        uid=0,
    )
    assert _verdict(sample) == "reward 1 | finish stop"
    assert _verdict(replace(sample, weight_version=0)) == "reward 1 | finish stop | weights 0"


def test_few_steps_are_whole_numbers() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _draw(axis, Curve(metric="loss"), [1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0], "#000000")
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1, 2, 3, 4]


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A closed port of this machine in the hub's place."""
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"no such directory here, and http://127.0.0.1:9 does not"):
        hub.check_reachable("nobody/nothing")
    with hub.offline_without_the_hub("nobody/nothing"):
        assert hub.constants.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE
    hub.check_reachable(str(tmp_path))
    hub.check_reachable("/nowhere/else")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.check_reachable("nobody/nothing")
