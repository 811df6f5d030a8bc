"""Finished episodes as the columns of their rows (workers/columns.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from workers.agents.executor import Finished
from workers.agents.outcome import FAILED


@dataclass(kw_only=True)
class Row:
    """One episode as a row; nothing of a failed one is trained on."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    rollout_log_probs: list[float] = field(default_factory=list)
    turn_lengths: list[int] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    finish_reason: str = FAILED
    weight_version: int = -1
    episode_rewards: float = 0.0
    episode_metrics: dict[str, Any] = field(default_factory=dict)


WRITES = (
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "rollout_log_probs",
    "num_sampled",
    "turn_lengths",
    "turn_rewards",
    "finish_reason",
    "num_tokens",
    "weight_version",
    "episode_rewards",
    "episode_metrics",
)
"""The columns of an episode."""


def row_of(finished: Finished, weight_version: int, given_up: bool) -> Row:
    """`given_up`: whether the episode's group was; `weight_version`: of the present weights."""
    transcript = finished.model.transcript
    start = transcript.prompt_length
    prompt = transcript.ids[:start] or [0]
    metrics: dict[str, Any] = {
        "failures": [failure.kind for failure in finished.failures],
        "environment_s": finished.environment_s,
        "tool_s": finished.model.tool_s,
    }
    outcome = finished.outcome
    if outcome is None or given_up:
        return Row(prompt_ids=prompt[:1], weight_version=weight_version, episode_metrics=metrics)
    lengths = [turn.length for turn in transcript.turns]
    versions = [turn.weight_version for turn in transcript.turns]
    reason = finished.model.finish_reason
    if outcome.abandoned or not reason:
        reason = "abandoned"
    return Row(
        prompt_ids=prompt,
        response_ids=transcript.ids[start:],
        loss_mask=transcript.sampled[start:],
        rollout_log_probs=transcript.log_probs,
        turn_lengths=lengths,
        turn_rewards=list(outcome.turn_rewards or [0.0] * len(lengths)),
        finish_reason=reason,
        weight_version=min(versions, default=weight_version),
        episode_rewards=outcome.reward,
        episode_metrics=metrics | {"numbers": dict(outcome.metrics)},
    )


def batch_of(rows: Sequence[Row]) -> Batch:
    """The columns WRITES of the rows."""
    num_sampled, num_tokens = [], []
    for row in rows:
        num_sampled.append(len(row.rollout_log_probs))
        num_tokens.append(len(row.prompt_ids) + len(row.response_ids))
    return Batch.of(
        prompt_ids=Ragged.of([row.prompt_ids for row in rows], torch.int64),
        response_ids=Ragged.of([row.response_ids for row in rows], torch.int64),
        loss_mask=Ragged.of([row.loss_mask for row in rows], torch.bool),
        rollout_log_probs=Ragged.of([row.rollout_log_probs for row in rows], torch.float32),
        num_sampled=torch.tensor(num_sampled, dtype=torch.int64),
        turn_lengths=Ragged.of([row.turn_lengths for row in rows], torch.int64),
        turn_rewards=Ragged.of([row.turn_rewards for row in rows], torch.float32),
        finish_reason=[row.finish_reason for row in rows],
        num_tokens=torch.tensor(num_tokens, dtype=torch.int64),
        weight_version=torch.tensor([row.weight_version for row in rows], dtype=torch.int64),
        episode_rewards=torch.tensor([row.episode_rewards for row in rows]),
        episode_metrics=[row.episode_metrics for row in rows],
    )
