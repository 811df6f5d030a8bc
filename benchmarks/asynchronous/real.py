"""Two pools of one CPU process each: GRPO on a random model whose responses have geometric lengths,
at most 6 times their mean."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

from hybridflow import open_session
from tests.tiny import VOCAB, make_data, make_model

MEAN_TOKENS = 16
MODELS = {"tiny": {"layers": 1, "heads": 4}, "3m": {"layers": 4, "heads": 8}}
WARM_UP = 2
"""Steps that are not counted."""


def score(*, response: str, **columns: object) -> float:
    """The share of even words."""
    words = response.split()
    return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


def settings(directory: Path, model: str) -> dict[str, Any]:
    """The run's, without asynchrony."""
    stops = round(VOCAB / MEAN_TOKENS)
    return {
        "model.path": make_model(directory / "model", **MODELS[model]),
        "data.train": make_data(directory / "prompts.jsonl", rows=512),
        "data.batch_size": 8,
        "algorithm.samples_per_prompt": 4,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 6 * MEAN_TOKENS,
        "actor.generation.sampling.stop_token_ids": list(range(3, 3 + stops)),
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 3e-4,
        "placement": "custom",
        "pools.training.num_devices": 1,
        "pools.training.roles": ["actor", "reference", "reward"],
        "pools.generation.num_devices": 1,
        "pools.generation.roles": ["generation"],
        "threads_per_device": 1,
        "cluster.address": "local",
        "recovery.snapshot_every": 0,
        "loop.resume": "never",
        "metrics.console": False,
        "metrics.tensorboard": False,
    }


def measure(
    directory: Path, model: str, staleness: int, mode: str, num_steps: int
) -> dict[str, Any]:
    """A row of the table: medians over the steps after the warm-up."""
    run = settings(directory, model) | {
        "loop.num_steps": num_steps,
        "output_dir": directory / "run",
    }
    if staleness:
        run |= {
            "asynchrony.staleness": staleness,
            "asynchrony.in_flight": mode,
            "actor.loss.rollout_correction.correction": "truncate",
        }
    with open_session("grpo", run, reward=score) as session:
        steps = [session.step() for _ in range(num_steps)]
    counted = steps[WARM_UP:]

    def of(name: str) -> float:
        return mean(step.get(name, 0.0) for step in counted)

    step_s = median(step["seconds/step"] for step in counted)
    row: dict[str, Any] = {
        "where": f"two CPU processes, {model}",
        "mode": mode if staleness else "synchronous",
        "staleness": staleness,
        "look_ahead": 1.0,
        "step_s": step_s,
        "reward": mean(step["reward/mean"] for step in steps[-5:]),
    }
    if not staleness:
        generating = of("seconds/generation.generate_sequences")
        return row | {
            "staleness_mean": 0.0,
            "staleness_max": 0.0,
            "bound": 0,
            "idle_generator": 1 - generating / of("seconds/step"),
            "idle_trainer": generating / of("seconds/step"),
        }
    bound = session.config.asynchrony.window(8).bound
    return row | {
        "staleness_mean": of("staleness/mean"),
        "staleness_max": max(step["staleness/max"] for step in counted),
        "bound": bound,
        "idle_generator": of("asynchrony/generator_idle"),
        "idle_trainer": of("asynchrony/trainer_waits"),
    }
