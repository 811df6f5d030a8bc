"""recipes.plan, recipes.calibrate and recipes.reshard_plan: a mistake is one line and status 2,
at once."""

from __future__ import annotations

import sys

import pytest

from recipes import calibrate, plan, reshard_plan

MAINS = {"plan": plan.main, "calibrate": calibrate.main, "reshard_plan": reshard_plan.main}
LAYOUTS = ["source=2-4-1", "target=1-2", "model=llama-7b"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("plan", ["clustr=8xA100-80GB"], "no setting 'clustr'; did you mean cluster?"),
        ("plan", ["updates=4"], "updates is now num_mini_batches"),
        ("calibrate", ["num_procs=2"], "no setting 'num_procs'; did you mean num_processes?"),
        ("calibrate", ["repeats=many"], "repeats is 'many': Value 'many' of type 'str'"),
        ("calibrate", ["repeats=0"], "repeats is 0; use at least 1"),
        ("calibrate", ["rows=[]"], "rows is []; use at least 1"),
        ("calibrate", ["models=[3M,5M]"], "unknown ['5M']; known: 3M, 11M, 32M"),
        ("calibrate", ["models=[3M]"], "at least two of 3M, 11M, 32M"),
        ("calibrate", ["engine=megatron"], "engine is 'megatron'; known: fsdp"),
        ("calibrate", ["generation_engine=sglang"], "is 'sglang'; known: vllm"),
        (
            "reshard_plan",
            [*LAYOUTS, "buckt_mb=64"],
            "no setting 'buckt_mb'; did you mean bucket_mb?",
        ),
        ("reshard_plan", ["source=2-4-1"], "not set: model, target"),
        ("reshard_plan", [*LAYOUTS, "bucket_mb=0"], "bucket_mb is 0; use at least 1"),
        ("reshard_plan", [*LAYOUTS, "dtype=int7"], "dtype is 'int7'; known: float64"),
        (
            "reshard_plan",
            [*LAYOUTS, "rank_order=dp,tp"],
            "rank_order is 'dp,tp'; it must name each of",
        ),
        ("reshard_plan", [*LAYOUTS, "grouping=best"], "grouping is 'best'; known: fewest_bytes"),
    ],
)
def test_a_mistake_is_one_line(
    command: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as ended:
        MAINS[command]()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize("command", MAINS)
def test_help_lists_the_settings(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    MAINS[command]()
    printed = capsys.readouterr().out
    assert f"python -m recipes.{command}" in printed
    assert "\n  model" in printed
