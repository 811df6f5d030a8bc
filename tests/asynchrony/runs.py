"""Runs of a tiny model in this process, with and without responses that are drawn ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hybridflow import current_session
from hybridflow.errors import UserCodeError
from recipes.preparation import prepare
from recipes.python_api import make_settings
from recipes.session import Session
from tests.tiny import make_data, make_model

TRUNCATE = {"actor.loss.rollout_correction.correction": "truncate"}
TWO_POOLS = {
    "runtime": "ray",
    "placement": "custom",
    "pools.training.num_devices": 1,
    "pools.training.roles": ["actor", "reference", "reward"],
    "pools.generation.num_devices": 1,
    "pools.generation.roles": ["generation"],
    "threads_per_device": 1,
    "cluster.address": "local",
}


class StreamingSession(Session):
    """Draws through the streaming machinery, whatever asynchrony.staleness is."""

    @property
    def _draws_ahead(self) -> bool:
        return True


def tiny_settings(directory: Path) -> dict[str, Any]:
    """Two prompts a step, two samples each; about a fifth of the tokens end a response."""
    return {
        "runtime": "local",
        "device": "cpu",
        "model.path": make_model(directory / "model", layers=1),
        "data.train": make_data(directory / "prompts.jsonl", rows=16),
        "data.batch_size": 2,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 24,
        "actor.generation.sampling.stop_token_ids": list(range(3, 25)),
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-3,
        "asynchrony.slice_steps": 3,
        "loop.num_steps": 6,
        "metrics.tensorboard": False,
        "metrics.console": False,
    }


@dataclass
class Record:
    """The doings of a run."""

    responses: list[str] = field(default_factory=list)
    """As the reward function saw them, step after step."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    fails_at: int = -1
    """The number of the response at which the reward function fails once."""
    rows: list[str] = field(default_factory=list)
    """The row of data.train of each response."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    modulus: int = 7
    """The reward is the length of the response modulo this; 2: groups without a signal are common."""

    def reward(self, *, response: str, answer: str, **columns: object) -> float:
        if len(self.responses) == self.fails_at:
            self.fails_at = -1
            raise ValueError("the reward fails once")
        self.responses.append(response)
        self.rows.append(answer)
        return float(len(response) % self.modulus)

    def numbers(self) -> list[dict[str, float]]:
        """The metrics that are no seconds and say nothing of asynchrony."""
        timed = ("seconds", "asynchrony/", "staleness/", "sync/", "tokens_per_s", "memory")
        steps = []
        for step in self.metrics:
            steps.append(
                {
                    name: value
                    for name, value in step.items()
                    if not any(part in name for part in timed)
                }
            )
        return steps


def drive(
    settings: dict[str, Any],
    directory: Path,
    *,
    recipe: str = "grpo",
    session_class: type[Session] = Session,
    num_steps: int = 6,
    stops: bool = False,
    record: Record | None = None,
    reward: Any = None,
    retries: int = 0,
    environment: Any = None,
    validates: bool = False,
) -> Record:
    """Runs steps with `settings` and keeps what they did. `stops`: with a checkpoint, from which
    the next call with the same directory goes on. `reward`: instead of the record's own, which
    sees the responses of this process only. `retries`: steps that may fail and are taken again.
    `environment`: in place of a reward. `validates`: after every step."""
    record = record or Record()
    settings = settings | {"output_dir": directory}
    if environment is None:
        reward = reward or record.reward
    config = make_settings(recipe, settings, reward, None, None, environment)
    with session_class(prepare(config)) as session:
        while session.num_steps < num_steps:
            try:
                record.metrics.append(session.step())
            except UserCodeError:
                retries -= 1
                if retries < 0:
                    raise
                continue
            record.positions.append(session.loop.data.position)
            if validates:
                record.metrics[-1] |= {
                    f"validation/{name}": number for name, number in session.validate().items()
                }
        if stops:
            session.checkpoint()
        else:
            session.save(directory / "model")
            (weights,) = (directory / "model").glob("*model.safetensors")
            record.weights = load_file(weights)
    assert current_session() is None
    return record


def equal_weights(one: Record, other: Record) -> bool:
    """Bit for bit."""
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
