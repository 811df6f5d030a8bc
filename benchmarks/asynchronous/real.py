"""Two pools of one CPU process each: GRPO on a random model whose responses have geometric lengths,
at most 6 times their mean.

A pool is idle where it does none of a step's work: the generator draws nothing; the trainer runs none
of its calls, or waits in one for the generator to take part in a sync.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

from hybridflow import open_session
from tests.tiny import VOCAB, make_data, make_model

MODELS = {"tiny": {"layers": 1, "heads": 4}, "3m": {"layers": 4, "heads": 8}}
MEAN_TOKENS = {"tiny": 32, "3m": 24}
"""Of a response: with these the two pools have about as much to do."""
SLICE_STEPS = 4
"""Weights wait for two slices, and steps of these models take a second."""
WARM_UP = 3
"""Steps that are not counted."""
TRAINERS_CALLS = (
    "seconds/actor.compute_log_prob",
    "seconds/actor.update_actor",
    "seconds/reference.compute_ref_log_prob",
    "seconds/reward.compute_reward",
)


def score(*, response: str, **columns: object) -> float:
    """The share of even words."""
    words = response.split()
    return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


def settings(directory: Path, model: str, mean_tokens: int) -> dict[str, Any]:
    """The run's, without asynchrony."""
    stops = round(VOCAB / mean_tokens)
    return {
        "model.path": make_model(directory / "model", **MODELS[model]),
        "data.train": make_data(directory / "prompts.jsonl", rows=512),
        "data.batch_size": 8,
        "algorithm.samples_per_prompt": 4,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 6 * mean_tokens,
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
    directory: Path, model: str, staleness: int, mode: str, num_steps: int, mean_tokens: int
) -> dict[str, Any]:
    """A row of the table, over the steps after the warm-up; `mean_tokens`: 0 for the model's."""
    mean_tokens = mean_tokens or MEAN_TOKENS[model]
    run = settings(directory, model, mean_tokens) | {
        "loop.num_steps": num_steps,
        "output_dir": directory / "run",
    }
    if staleness:
        run |= {
            "asynchrony.staleness": staleness,
            "asynchrony.slice_steps": SLICE_STEPS,
            "asynchrony.in_flight": mode,
            "actor.loss.rollout_correction.correction": "truncate",
        }
    with open_session("grpo", run, reward=score) as session:
        steps = [session.step() for _ in range(num_steps)]
    counted = steps[WARM_UP:]

    def of(name: str) -> float:
        return mean(step.get(name, 0.0) for step in counted)

    step_s = of("seconds/step")
    training = sum(map(of, TRAINERS_CALLS))
    row: dict[str, Any] = {
        "where": f"two CPU processes, {model}",
        "mode": mode if staleness else "synchronous",
        "staleness": staleness,
        "look_ahead": 0.0 if mode == "drain" else 1.0,
        "mean_tokens": mean_tokens,
        "step_s": step_s,
        "step_s_median": median(step["seconds/step"] for step in counted),
        "idle_trainer": 1 - training / step_s,
        "trainer_s": training,
        "sync_s": of("seconds/actor.sync_weights"),
        "reward": mean(step["reward/mean"] for step in steps[-5:]),
        "staleness_mean": of("staleness/mean"),
        "staleness_max": max(step.get("staleness/max", 0.0) for step in counted),
        "bound": session.config.asynchrony.window(8).bound,
    }
    if not staleness:
        generating = of("seconds/generation.generate_sequences")
        return row | {"idle_generator": 1 - generating / step_s, "generator_s": generating}
    idle = of("asynchrony/generator_idle")
    return row | {"idle_generator": idle, "generator_s": step_s * (1 - idle)}
