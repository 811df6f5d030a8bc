"""What ends before a run starts: dry runs, graphs, the command with a mistake, and where a
resumed run begins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.checkpoint import CheckpointStore
from recipes.config import RunConfig
from recipes.main import recipe
from recipes.run import run
from recipes.session import start_step

pytestmark = pytest.mark.usefixtures("nothing_starts")
ROOT = Path(__file__).parents[2]


def test_a_dry_run_says_what_would_run_where(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            settings(
                "ppo", "dry_run=true", "num_devices=4", "actor.train.tp=2", "actor.generation.tp=4"
            )
        )
        is None
    )
    out = capsys.readouterr().out
    assert "ppo: 7 calls a step" in out
    assert (
        "actor      pool main (4 devices): train dp2 x tp2, generation tp4" in out
        and "critic     pool main (4 devices): train dp4" in out
    )


def test_a_dry_run_of_what_the_mapper_does_not_plan_says_so(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings("sft", "dry_run=true", "data.response_column=answer"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "seconds and memory: not predicted; the mapper plans training steps that answer prompts, "
        "not sft"
    )


def test_the_graph_needs_no_model_and_no_data(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings("ppo", "graph=true", "model.path=/no/such", "data.train=/no/such")) is None
    assert capsys.readouterr().out.startswith("flowchart LR")


def test_metrics_go_on_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    assert start_step("auto", store) == -1
    for step in (2, 4):
        (store.begin(step) / "weights").touch()
        store.commit(step, {})
    assert [
        start_step(resume, store) for resume in ("auto", "never", str(tmp_path / "step-00000002"))
    ] == [
        4,
        -1,
        2,
    ]


def test_the_command_in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes.ppo", "nonsense.setting=1"])
    with pytest.raises(SystemExit) as exit:
        recipe("ppo")()
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: nonsense.setting=1: there is no setting 'nonsense.setting'; --settings lists "
        "them all\n"
    )


def test_the_command_for_real(required: list[str], tmp_path: Path) -> None:
    """One message on stderr, no stack, status 2, nothing left behind."""
    arguments = [*required, "reward.function=no.such:f", f"output_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "recipes.grpo", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert len(errors) == 1 and errors[0].startswith(
        "error: reward.function='no.such:f': module 'no.such' can't be imported"
    )
    assert not (tmp_path / "run").exists()
