"""python -m recipes.rlhf: all three stages of RLHF on a tiny model, by the commands that a user
would type.

    recipes.sft            a model with random weights imitates demonstrations, most in the wrong order
    recipes.reward_model   from the fine-tuned model, on pairs that a known rule compared
    recipes.ppo            against the learned reward; the rule's own score is only measured (gold.function)

The policy sees the learned reward alone. Where that goes on rising while the rule's score falls,
the policy exploits the reward model's mistakes (Gao et al. 2023): both stand side by side in
curves.png and in the table. Leaves everything in outputs/rlhf.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybridflow.checkpoint import CheckpointStore
from hybridflow.metrics import Curve, draw_curves, read_jsonl
from recipes.child_command import run_command
from recipes.errors import plain_errors
from recipes.overrides import check_names
from recipes.quickstart.settings import devices
from recipes.quickstart.task import MAX_RESPONSE_TOKENS
from recipes.rlhf.data import Prepared, prepare

CONSOLE = Console()
FP32 = "train.precision=fp32"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.rlhf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/rlhf"))
    parser.add_argument(
        "overrides",
        nargs="*",
        help="further settings for PPO, such as loop.num_steps=80 algorithm.kl.coefficient=0",
    )
    arguments = parser.parse_args()
    with plain_errors():
        check_names(arguments.overrides)  # before the minute of preparation, not after it
    output: Path = arguments.output
    started = time.perf_counter()
    data = prepare(output / "data")
    seconds = {}
    for name, command in stages(data, output, arguments.overrides).items():
        CONSOLE.rule(name)
        CONSOLE.print(shlex.join(["python", *command]), soft_wrap=True, highlight=False)
        before = time.perf_counter()
        run_command(command)
        seconds[name] = time.perf_counter() - before
    summary = summarise(output, seconds | {"all": time.perf_counter() - started})
    draw_progress(output)
    show(summary, output)
    if summary["rule_after"] <= summary["rule_before"]:
        CONSOLE.print(
            "[red]the rule's score did not rise: the policy learned what the reward model says, "
            "not what the rule wants"
        )
        raise SystemExit(1)


def stages(data: Prepared, output: Path, overrides: list[str]) -> dict[str, list[str]]:
    """The command lines, stage by stage; each starts from what the one before it saved."""
    fine_tuned = huggingface(output / "sft", 200)
    rewards = huggingface(output / "reward_model", 250)
    return {
        "1. supervised fine-tuning": [
            "-m",
            "recipes.sft",
            "runtime=local",
            f"model.path={data.model}",
            f"output_dir={output}/sft",
            f"data.train={data.demonstrations}",
            f"data.validation={data.held_out_demonstrations}",
            "data.batch_size=64",
            f"policy.{FP32}",
            "policy.train.optimizer.learning_rate=3e-3",
            "policy.train.optimizer.schedule=cosine",
            "policy.train.optimizer.warmup_steps=20",
            "loop.num_steps=200",
            "loop.validate_every=50",
            "loop.resume=never",
        ],
        "2. reward model": [
            "-m",
            "recipes.reward_model",
            "runtime=local",
            f"model.path={fine_tuned}",
            f"output_dir={output}/reward_model",
            f"data.train={data.pairs}",
            f"data.validation={data.held_out_pairs}",
            "data.batch_size=32",
            f"reward_model.{FP32}",
            "reward_model.train.optimizer.learning_rate=1e-3",
            "reward_model.train.optimizer.schedule=cosine",
            "reward_model.train.optimizer.warmup_steps=10",
            "loop.num_steps=250",
            "loop.validate_every=50",
            "loop.resume=never",
        ],
        "3. PPO against the learned reward": [
            "-m",
            "recipes.ppo",
            devices(),
            f"model.path={fine_tuned}",
            f"reward.model.path={rewards}",
            "gold.function=recipes.rlhf.rule:score",
            f"output_dir={output}/ppo",
            f"data.train={data.prompts}",
            f"data.validation={data.held_out_prompts}",
            "data.batch_size=64",
            f"actor.{FP32}",
            f"critic.{FP32}",
            f"reference.{FP32}",
            f"reward.{FP32}",
            "actor.generation.precision=fp32",
            "actor.generation.max_model_len=64",
            f"actor.generation.sampling.max_response_tokens={MAX_RESPONSE_TOKENS}",
            "actor.train.optimizer.learning_rate=5e-5",
            "critic.train.optimizer.learning_rate=3e-4",
            "critic.loss.clip=0.5",
            "algorithm.samples_per_prompt=4",
            "algorithm.num_mini_batches=2",
            "algorithm.kl.coefficient=0.02",
            "loop.num_steps=40",
            "loop.validate_every=4",
            "loop.resume=never",
            *overrides,
        ],
    }


def huggingface(run: Path, step: int) -> Path:
    """The model that a run of so many steps saves."""
    return run / "checkpoints" / f"step-{step:08d}" / "huggingface"


def summarise(output: Path, seconds: dict[str, float]) -> dict[str, Any]:
    results = {}
    for name in ("sft", "reward_model", "ppo"):
        results[name] = json.loads((output / name / "summary.json").read_text())
    before, after = results["ppo"]["validation_before"], results["ppo"]["validation_after"]
    checkpoint = CheckpointStore(output / "ppo" / "checkpoints").latest()
    assert checkpoint is not None, "the loop ends with a checkpoint"
    summary: dict[str, Any] = {
        "sft_loss_before": results["sft"]["validation_before"]["loss"],
        "sft_loss_after": results["sft"]["validation_after"]["loss"],
        "reward_model_accuracy": results["reward_model"]["validation_after"]["accuracy"],
    }
    for name, key in NAMES.items():
        summary[f"{name}_before"] = before[key]
        summary[f"{name}_after"] = after[key]
    summary |= {"seconds": seconds, "policy": str(checkpoint.path / "huggingface")}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


NAMES = {"learned_reward": "reward/mean", "rule": "gold/mean", "exact": "gold/exact"}


def draw_progress(output: Path) -> None:
    curves = [
        Curve(metric="reward/mean", split="validation", label="learned reward"),
        Curve(metric="gold/mean", split="validation", label="the rule's score", percent=True),
        Curve(metric="kl/reference", label="KL to the fine-tuned model, nats"),
    ]
    draw_curves(output / "ppo" / "metrics.jsonl", output / "curves.png", curves)


def show(summary: dict[str, Any], output: Path) -> None:
    table = Table(title="PPO against the learned reward, on held-out prompts")
    for column in ("step", "learned reward", "the rule's score", "exactly right"):
        table.add_column(column, justify="right")
    for row in read_jsonl(output / "ppo" / "metrics.jsonl"):
        if row["split"] == "validation":
            table.add_row(
                str(row["step"]),
                f"{row['reward/mean']:.3f}",
                f"{row['gold/mean']:.1%}",
                f"{row['gold/exact']:.1%}",
            )
    CONSOLE.print(table)
    CONSOLE.print(
        f"reward model: {summary['reward_model_accuracy']:.1%} of held-out pairs; all stages: "
        f"{summary['seconds']['all']:.0f} s; curves: {output}/curves.png, summary: "
        f"{output}/summary.json",
        highlight=False,
    )


if __name__ == "__main__":
    main()
