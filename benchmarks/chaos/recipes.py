"""Tiny runs of every kind of recipe and of every way to draw responses, for kills of a run in one
process (one_process.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.agents.chat import chat_settings
from tests.images import runs as images
from tests.tiny import make_data, make_model

BY_LENGTH = "benchmarks.chaos.reward:by_length"
NUM_STEPS = 4
RL = {
    "data.batch_size": 3,
    "algorithm.samples_per_prompt": 2,
    "actor.generation.engine": "hf",
    "actor.generation.precision": "fp32",
    "actor.generation.sampling.max_response_tokens": 5,
    "actor.train.precision": "fp32",
    "actor.train.optimizer.learning_rate": 1e-2,
    "reward.function": BY_LENGTH,
}
AHEAD = {
    "asynchrony.staleness": 1,
    "asynchrony.slice_steps": 3,
    "actor.loss.rollout_correction.correction": "truncate",
}
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe with its settings, those of places excepted."""

    recipe: str
    settings: Settings
    is_exact: bool = True
    """Whether a disturbed run ends with the undisturbed one's weights; otherwise only its rows are
    compared."""


def common(directory: Path) -> Settings:
    return {
        "model.path": make_model(directory / "model", layers=2),
        "data.train": make_data(directory / "prompts.jsonl", rows=10),
        "data.validation": make_data(directory / "held-out.jsonl", rows=3, seed=1),
        "loop.num_steps": NUM_STEPS,
        "loop.validate_every": 2,
        "loop.checkpoint_every": 2,
        "metrics.console": False,
    }


def answers(directory: Path, recipe: str, changes: Settings) -> Case:
    """A recipe whose rows are prompts."""
    return Case(recipe=recipe, settings=common(directory) | RL | changes)


def given(directory: Path, recipe: str, role: str) -> Case:
    """A recipe whose rows hold responses."""
    lines = []
    for row in range(10):
        numbers = [str(3 + (7 * row + 5 * place) % 120) for place in range(8)]
        prompt, chosen, rejected = (
            numbers[: 1 + row % 3],
            numbers[3 : 5 + row % 3],
            numbers[::-1][:3],
        )
        line = {"prompt": " ".join(prompt), "chosen": " ".join(chosen)}
        line |= {"response": line["chosen"], "rejected": " ".join(rejected)}
        lines.append(json.dumps(line) + "\n")
    path = directory / "rows.jsonl"
    path.write_text("".join(lines))
    settings = common(directory) | {"data.train": path, "data.validation": path}
    settings |= {
        "data.batch_size": 3,
        f"{role}.train.precision": "fp32",
        f"{role}.train.optimizer.learning_rate": 1e-2,
    }
    if recipe == "dpo":
        settings["reference.train.precision"] = "fp32"
    return Case(recipe=recipe, settings=settings)


def acting(directory: Path, changes: Settings, *, is_exact: bool = True) -> Case:
    """GRPO on episodes."""
    apart = directory / "chat"  # a model of its own, with words and a template
    apart.mkdir(exist_ok=True)
    tasks = chat_settings(apart)
    settings = common(directory) | tasks | {"data.validation": tasks["data.train"]} | changes
    settings["environment"] = "benchmarks.chaos.reward:Echo"
    return Case(recipe="grpo", settings=settings, is_exact=is_exact)


def with_images(directory: Path) -> Case:
    settings = images.settings(directory) | {"data.batch_size": 4, "reward.function": BY_LENGTH}
    shared = common(directory)
    del shared["data.validation"], shared["loop.validate_every"]
    return Case(recipe="grpo", settings=shared | settings)


def safe_rlhf(directory: Path) -> Settings:
    return {
        "cost.function": BY_LENGTH,
        "data.pretraining": make_data(directory / "texts.jsonl", rows=7, seed=2),
        "data.pretraining_column": "prompt",
        "data.pretraining_batch_size": 3,
        "data.pretraining_tokens": 4,
        **dict.fromkeys(
            [f"{role}.train.precision" for role in ("critic", "cost_critic", "reference")], "fp32"
        ),
    }


def teacher(directory: Path) -> Settings:
    return {
        "teacher.model.path": make_model(directory / "teacher", layers=1, seed=1),
        "teacher.train.precision": "fp32",
    }


PPO = {
    "critic.train.precision": "fp32",
    "reference.train.precision": "fp32",
    "algorithm.num_mini_batches": 2,
    "actor.critic_warmup_steps": 1,
    "algorithm.kl.target": 6,
}
GROUPS = {"algorithm.samples_per_prompt": 4}
CASES: dict[str, Callable[[Path], Case]] = {
    "ppo": lambda at: answers(at, "ppo", PPO),
    "grpo": lambda at: answers(at, "grpo", {}),
    "dapo": lambda at: answers(at, "dapo", GROUPS | {"algorithm.overlong_buffer_tokens": 2}),
    "remax": lambda at: answers(at, "remax", {"algorithm.samples_per_prompt": 1}),
    "safe_rlhf": lambda at: answers(at, "safe_rlhf", safe_rlhf(at)),
    "distillation": lambda at: answers(at, "distillation", teacher(at)),
    "sft": lambda at: given(at, "sft", "policy"),
    "dpo": lambda at: given(at, "dpo", "policy"),
    "reward_model": lambda at: given(at, "reward_model", "reward_model"),
    "lora": lambda at: answers(at, "grpo", {"actor.train.lora.rank": 4}),
    "episodes": lambda at: acting(at, {}),
    "drain": lambda at: answers(at, "grpo", AHEAD | {"asynchrony.in_flight": "drain"}),
    "drain dapo": lambda at: answers(
        at, "dapo", GROUPS | AHEAD | {"asynchrony.in_flight": "drain"}
    ),
    "drain remax": lambda at: answers(at, "remax", AHEAD | {"asynchrony.in_flight": "drain"}),
    "drain episodes": lambda at: acting(at, AHEAD | {"asynchrony.in_flight": "drain"}),
    "recompute": lambda at: Case(recipe="grpo", settings=common(at) | RL | AHEAD, is_exact=False),
    "images": with_images,
    "every third step": lambda at: answers(
        at, "grpo", {"recovery.snapshot_every": 3, "loop.num_steps": 7, "loop.checkpoint_every": 4}
    ),
    "disk alone": lambda at: answers(at, "grpo", {"recovery.snapshot_every": 0}),
    "an epoch": lambda at: answers(
        at,
        "grpo",
        {
            "loop.num_steps": None,
            "loop.num_epochs": 1,
            "loop.validate_every": 1,
            "loop.keep_last": 1,
        },
    ),
}
"""Name -> the case, whose inputs are written to a directory."""


def case(name: str, directory: Path) -> Case:
    """A ValueError for an unknown name."""
    if name not in CASES:
        raise ValueError(f"{name!r} is no case; choose from {', '.join(CASES)}")
    directory.mkdir(parents=True, exist_ok=True)
    return CASES[name](directory)
