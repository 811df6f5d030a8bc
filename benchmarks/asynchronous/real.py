"""Two pools of one CPU process each: GRPO on a random model; the responses to a prompt are as long as
a log-normal number says, sigma 1, at most 6 times the mean.

A pool is idle where it does none of a step's work: the generator draws nothing; the trainer runs none
of its calls, or waits in one for the generator to take part in a sync.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from controllers.data import RowDataset
from hybridflow.batch import Batch
from recipes.preparation import prepare
from recipes.python_settings import make_settings
from recipes.session import Session
from tests.tiny import make_data, make_model

MODELS = {"tiny": {"layers": 1, "heads": 4}, "3m": {"layers": 4, "heads": 8}}
MEAN_TOKENS = {"tiny": 32, "3m": 24}
"""Of a response: with these the two pools have about as much to do."""
SLICE_STEPS = 8
"""Weights wait for two slices, and steps of these models take a second or two."""
WARM_UP, LAST = 3, 3
"""Steps that are not counted: in the last ones nothing more is drawn ahead."""
NUM_PROMPTS, SAMPLES, NUM_ROWS = 64, 2, 2048
CORRECTIONS = {
    "rollout": {"actor.loss.old_policy": "rollout"},
    "truncate": {"actor.loss.rollout_correction.correction": "truncate"},
}
"""The loss' ratio is taken to the policy that drew the token; or to the trainer's before the update,
which is another forward pass, with a truncated weight."""
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
    return {
        "model.path": make_model(directory / "model", **MODELS[model]),
        "data.train": make_data(directory / "prompts.jsonl", rows=NUM_ROWS),
        "data.batch_size": NUM_PROMPTS,
        "algorithm.samples_per_prompt": SAMPLES,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 6 * mean_tokens,
        "actor.generation.sampling.ignore_eos": True,
        "actor.loss.kl_coefficient": 0.01,
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


def limit_responses(dataset: RowDataset, mean_tokens: int) -> None:
    """Every prompt gets a length of its own, the same in every run."""
    shares = np.random.default_rng(0).lognormal(-0.5, 1, len(dataset)).clip(max=6)
    lengths = torch.from_numpy((shares * mean_tokens).round().clip(min=1).astype(np.int64))
    make_rows = dataset.rows

    def rows(places: np.ndarray, uids: np.ndarray) -> Batch:
        return make_rows(places, uids) | Batch.of(max_response_tokens=lengths[places])

    dataset.rows = rows  # type: ignore[method-assign]


def measure(
    directory: Path,
    model: str,
    staleness: int,
    mode: str,
    num_steps: int,
    mean_tokens: int,
    correction: str,
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
        } | CORRECTIONS[correction]
    prepared = prepare(make_settings("grpo", run, score))
    limit_responses(prepared.train, mean_tokens)
    with Session(prepared) as session:
        steps = [session.step() for _ in range(num_steps)]
    counted = steps[WARM_UP:-LAST]

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
        "correction": correction if staleness else "",
        "step_s": step_s,
        "step_s_median": median(step["seconds/step"] for step in counted),
        "idle_trainer": 1 - training / step_s,
        "trainer_s": training,
        "sync_s": of("seconds/actor.sync_weights"),
        "reward": mean(step["reward/mean"] for step in steps[-5:]),
        "staleness_mean": of("staleness/mean"),
        "staleness_max": max(step.get("staleness/max", 0.0) for step in counted),
        "bound": session.config.asynchrony.window(NUM_PROMPTS).bound,
    }
    if not staleness:
        generating = of("seconds/generation.generate_sequences")
        return row | {"idle_generator": 1 - generating / step_s, "generator_s": generating}
    idle = of("asynchrony/generator_idle")
    return row | {"idle_generator": idle, "generator_s": step_s * (1 - idle)}
