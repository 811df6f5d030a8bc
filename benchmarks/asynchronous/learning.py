"""Reward at equal samples: GRPO on a tiny task that it learns, in this process, from responses of
older and older weights.

Which weights draw a response does not depend on where it is drawn: the staleness is that of two
pools. Each row is a mean over seeds of the model, the data and the draws.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.asynchronous.real import score
from hybridflow import open_session
from tests.tiny import VOCAB, make_data, make_model

MEAN_TOKENS, MOST_TOKENS = 8, 32
LEARNING_RATE = 3e-4
NUM_STEPS = 40
"""With these the reward ends on its way up, where a slower run would show."""
COUNTED = 5
"""Steps at the beginning and at the end whose rewards are averaged."""


def settings(directory: Path, seed: int, num_steps: int) -> dict[str, Any]:
    """The run's, without asynchrony."""
    stops = round(VOCAB / MEAN_TOKENS)
    return {
        "runtime": "local",
        "device": "cpu",
        "seed": seed,
        "model.path": make_model(directory / "model", layers=1, seed=seed),
        "data.train": make_data(directory / "prompts.jsonl", rows=256, seed=seed),
        "data.batch_size": 8,
        "algorithm.samples_per_prompt": 4,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": MOST_TOKENS,
        "actor.generation.sampling.stop_token_ids": list(range(3, 3 + stops)),
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": LEARNING_RATE,
        "loop.num_steps": num_steps,
        "loop.resume": "never",
        "output_dir": directory / "run",
        "recovery.snapshot_every": 0,
        "metrics.console": False,
        "metrics.tensorboard": False,
    }


def run(directory: Path, staleness: int, mode: str, seed: int, num_steps: int) -> dict[str, float]:
    """The numbers of one run."""
    changes: dict[str, Any] = {}
    if staleness:
        changes = {
            "asynchrony.staleness": staleness,
            "asynchrony.slice_steps": 4,
            "asynchrony.in_flight": mode,
            "actor.loss.rollout_correction.correction": "truncate",
        }
    with open_session(
        "grpo", settings(directory, seed, num_steps) | changes, reward=score
    ) as session:
        steps = [session.step() for _ in range(num_steps)]
        bound = session.config.asynchrony.window(8).bound
    rewards = [step["reward/mean"] for step in steps]
    steady = steps[len(steps) // 4 :]
    return {
        "before": mean(rewards[:COUNTED]),
        "after": mean(rewards[-COUNTED:]),
        "staleness_mean": mean(step.get("staleness/mean", 0.0) for step in steady),
        "staleness_max": max(step.get("staleness/max", 0.0) for step in steps),
        "bound": bound,
    }


def measure(
    directory: Path, staleness: int, mode: str, num_seeds: int, num_steps: int
) -> dict[str, Any]:
    """A row of the table."""
    runs = []
    for seed in range(num_seeds):
        runs.append(run(directory / str(seed), staleness, mode, seed, num_steps))
    after = [of_run["after"] for of_run in runs]
    return {
        "where": f"one process, {num_steps} steps",
        "mode": mode if staleness else "synchronous",
        "staleness": staleness,
        "look_ahead": 1.0,
        "staleness_mean": mean(of_run["staleness_mean"] for of_run in runs),
        "staleness_max": max(of_run["staleness_max"] for of_run in runs),
        "bound": runs[0]["bound"],
        "reward_before": mean(of_run["before"] for of_run in runs),
        "reward": mean(after),
        "rewards": after,
        "reward_spread": stdev(after) if num_seeds > 1 else 0.0,
        "seeds": num_seeds,
    }
