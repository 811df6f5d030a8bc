"""python -m recipes.quickstart: a tiny model, a task with verifiable answers, and then what a user
would run: recipes.ppo.

Leaves in outputs/quickstart: summary.json, metrics.jsonl, curves.png, and the trained policy as a
Hugging Face directory; in outputs/quickstart-data, for the next call too, the model and data that it
begins with.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybridflow.checkpoint import CheckpointStore
from hybridflow.metrics import Curve, draw_curves
from recipes.child_command import run_command
from recipes.errors import plain_errors
from recipes.overrides import check_names
from recipes.quickstart.prepare import Prepared, prepare
from recipes.quickstart.settings import SETTINGS, devices


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", choices=sorted(SETTINGS), default="ppo")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="default: outputs/quickstart, for grpo outputs/quickstart-grpo",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="further settings for the recipe, such as loop.num_steps=5 runtime=local",
    )
    arguments = parser.parse_args()
    with plain_errors():
        check_names(arguments.overrides)  # before the minute of preparation, not after it
        for override in arguments.overrides:
            if override.startswith("output_dir="):
                raise ValueError(
                    f"{override}: the quickstart reads what it shows from --output; set that"
                )
    output = arguments.output or Path(
        "outputs/quickstart"
        if arguments.recipe == "ppo"
        else f"outputs/quickstart-{arguments.recipe}"
    )
    console = Console()
    prepared = prepare(Path("outputs/quickstart-data"), console=console)
    command = recipe_command(arguments.recipe, prepared, output, arguments.overrides)
    console.rule("What a user would run")
    console.print(shlex.join(["python", *command]), soft_wrap=True, highlight=False)
    console.rule()
    run_command(command)
    summary = summarise(output)
    if not is_drawn(output):
        draw_progress(output)
    show(console, summary, output)


def recipe_command(
    recipe: str, prepared: Prepared, output: Path, overrides: list[str]
) -> list[str]:
    """-m recipes.<recipe> with the quickstart's settings; later ones win."""
    settings = [
        f"model.path={prepared.model_path}",
        f"data.train={prepared.train_path}",
        f"data.validation={prepared.test_path}",
        f"output_dir={output}",
        devices(),
        *SETTINGS[recipe],
        *overrides,
    ]
    last = {setting.partition("=")[0]: setting for setting in settings}
    return ["-m", f"recipes.{recipe}", *last.values()]


def summarise(output: Path) -> dict[str, Any]:
    """summary.json in the quickstart's words: its reward is 1 for a right answer, so
    validation's mean reward is the accuracy. Of a run that was finished before, it is there."""
    path = output / "summary.json"
    outcome: dict[str, Any] = json.loads(path.read_text())
    if "accuracy_after" in outcome:
        return outcome
    summary = {
        "accuracy_before": outcome["reward_before"],
        "accuracy_after": outcome["reward_after"],
        "train_seconds": outcome["train_s"],
        "num_steps": outcome["num_steps"],
        "tokens_per_second": outcome["tokens"] / outcome["train_s"],
        "max_log_prob_gap": outcome["largest"]["actor/log_prob_gap_max"],
        "seconds_per_phase": outcome["phase_s"],
    }
    path.write_text(json.dumps(summary, indent=1))
    checkpoint = CheckpointStore(output / "checkpoints").latest()
    assert checkpoint is not None, "the loop ends with a checkpoint"
    shutil.copytree(checkpoint.path / "huggingface", output / "huggingface", dirs_exist_ok=True)
    return summary


def is_drawn(output: Path) -> bool:
    """Whether curves.png has all that was logged."""
    picture, metrics = output / "curves.png", output / "metrics.jsonl"
    return picture.is_file() and picture.stat().st_mtime >= metrics.stat().st_mtime


def draw_progress(output: Path) -> None:
    curves = [
        Curve(metric="reward/mean", label="reward of the samples"),
        Curve(
            metric="reward/mean",
            split="validation",
            label="held-out accuracy, greedy",
            percent=True,
        ),
    ]
    draw_curves(output / "metrics.jsonl", output / "curves.png", curves)


def show(console: Console, summary: dict[str, Any], output: Path) -> None:
    table = Table(title="quickstart", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in summary.items():
        for key, number in value.items() if isinstance(value, dict) else [(name, value)]:
            table.add_row(key if key == name else f"  {key}, s", f"{number:.4g}")
    console.print(table)
    console.print(
        (
            f"curves: {output}/curves.png   policy: {output}/huggingface   metrics: "
            f"{output}/metrics.jsonl"
        ),
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
