"""recipes.plan, recipes.calibrate and recipes.reshard_plan: a mistake is one line and status 2,
at once."""

from __future__ import annotations

import sys

import pytest

from recipes import calibrate, plan, reshard_plan
from recipes.calibration_config import SIZES, CalibrateConfig, check, for_devices

MAINS = {"plan": plan.main, "calibrate": calibrate.main, "reshard_plan": reshard_plan.main}
LAYOUTS = ["source=2-4-1", "target=1-2", "model=llama-7b"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("plan", ["clustr=8xA100-80GB"], "no setting 'clustr'; did you mean cluster?"),
        ("plan", ["updates=4"], "updates is now num_mini_batches"),
        ("calibrate", ["num_procs=2"], "no setting 'num_procs'; did you mean num_processes?"),
        ("calibrate", ["repeats=many"], "repeats=many: 'many' is not a whole number"),
        ("calibrate", ["repeats=0"], "repeats is 0; use at least 1"),
        ("calibrate", ["rows=[0]"], "rows is [0]; use at least 1"),
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


@pytest.mark.parametrize(("num_gpus", "processes"), [(0, 2), (1, 1), (8, 8)])
def test_what_calibration_measures_is_by_device(num_gpus: int, processes: int) -> None:
    """G25: models of 3 to 32 million parameters measure a GPU's launches, and a second process has no
    GPU where there is one."""
    settled = for_devices(CalibrateConfig(), num_gpus)
    check(settled, num_gpus)
    assert settled.num_processes == processes
    largest = SIZES[settled.models[-1]]
    layers, hidden, inner, vocabulary = largest
    parameters = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * vocabulary * hidden
    assert (parameters > 1e9) is (num_gpus > 0)
    chosen = CalibrateConfig(models=["3M", "1B"], num_processes=1, rows=[2], memory_gb=3.0)
    kept = for_devices(chosen, num_gpus)
    assert (kept.models, kept.num_processes, kept.rows) == (["3M", "1B"], 1, [2])
    assert kept.memory_gb == 3.0
    with pytest.raises(ValueError, match="num_processes is 9, but there are 8 GPUs"):
        check(for_devices(CalibrateConfig(num_processes=9), 8), 8)
