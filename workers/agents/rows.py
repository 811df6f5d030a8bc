"""Finished episodes as the columns of their rows (workers/columns.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from workers.agents.live import Finished
from workers.agents.outcome import FAILED
from workers.agents.transcript import Transcript, Turn


@dataclass(kw_only=True)
class Row:
    """One episode as a row; nothing of a failed one is trained on."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    segment_lengths: list[int] = field(default_factory=list)
    rollout_log_probs: list[float] = field(default_factory=list)
    turn_lengths: list[int] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    finish_reason: str = FAILED
    weight_version: int = -1
    token_version: list[int] = field(default_factory=list)
    episode_rewards: float = 0.0
    episode_metrics: dict[str, Any] = field(default_factory=dict)


WRITES = (
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "segment_lengths",
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
WRITES_AHEAD = (*WRITES, "token_version")
"""Those of one that was drawn ahead of its step."""


def row_of(finished: Finished, weight_version: int, given_up: str = "") -> Row:
    """`given_up`: why the episode's group was, empty where it was not; `weight_version`: of the
    present weights."""
    segments = finished.segments
    transcripts = in_order(segments.transcripts)
    start = transcripts[0].prompt_length
    prompt = transcripts[0].ids[:start] or [0]
    metrics: dict[str, Any] = {
        "failures": [failure.kind for failure in finished.failures],
        "environment_s": sum(finished.laps),
        "tool_s": segments.tool_s,
    }
    outcome = finished.outcome
    if given_up:
        return Row(
            prompt_ids=prompt[:1],
            segment_lengths=[1],
            weight_version=weight_version,
            episode_metrics=metrics | {"reason": given_up},
        )
    assert outcome is not None, "the group of one that failed is given up"
    ids: list[int] = []
    sampled: list[bool] = []
    log_probs: list[float] = []
    versions: list[int] = []
    turns: list[Turn] = []
    for transcript in transcripts:
        ids += transcript.ids
        sampled += transcript.sampled
        log_probs += transcript.log_probs
        versions += transcript.weight_versions
        turns += transcript.turns
    before_each, after = finished.laps[: len(turns)], finished.laps[len(turns) :]
    seconds = [before_each[turn.number] for turn in turns if turn.number < len(before_each)] + after
    earned = outcome.turn_rewards or [0.0] * len(turns)
    reason = finished.segments.finish_reason
    if outcome.abandoned or not reason:
        reason = "abandoned"
    return Row(
        prompt_ids=prompt,
        response_ids=ids[start:],
        loss_mask=sampled[start:],
        segment_lengths=[max(len(transcript), 1) for transcript in transcripts],
        rollout_log_probs=log_probs,
        turn_lengths=[turn.length for turn in turns],
        turn_rewards=[earned[turn.number] for turn in turns],
        finish_reason=reason,
        weight_version=min(versions, default=weight_version),
        token_version=versions,
        episode_rewards=outcome.reward,
        episode_metrics=metrics | {"numbers": dict(outcome.metrics), "turn_s": seconds},
    )


def in_order(transcripts: Sequence[Transcript]) -> list[Transcript]:
    """Those with a reply, the one with the last reply last, which is where the reward of the whole
    episode belongs; the first one alone where there is no reply at all."""
    spoken = [transcript for transcript in transcripts if transcript.turns]
    return sorted(spoken, key=_last_reply) or [transcripts[0]]


def _last_reply(transcript: Transcript) -> int:
    return transcript.turns[-1].number


def batch_of(rows: Sequence[Row]) -> Batch:
    """The columns WRITES_AHEAD of the rows."""
    num_sampled, num_tokens = [], []
    for row in rows:
        num_sampled.append(len(row.rollout_log_probs))
        num_tokens.append(len(row.prompt_ids) + len(row.response_ids))
    return Batch.of(
        prompt_ids=Ragged.of([row.prompt_ids for row in rows], torch.int64),
        response_ids=Ragged.of([row.response_ids for row in rows], torch.int64),
        loss_mask=Ragged.of([row.loss_mask for row in rows], torch.bool),
        segment_lengths=Ragged.of([row.segment_lengths for row in rows], torch.int64),
        rollout_log_probs=Ragged.of([row.rollout_log_probs for row in rows], torch.float32),
        num_sampled=torch.tensor(num_sampled, dtype=torch.int64),
        turn_lengths=Ragged.of([row.turn_lengths for row in rows], torch.int64),
        turn_rewards=Ragged.of([row.turn_rewards for row in rows], torch.float32),
        finish_reason=[row.finish_reason for row in rows],
        num_tokens=torch.tensor(num_tokens, dtype=torch.int64),
        weight_version=torch.tensor([row.weight_version for row in rows], dtype=torch.int64),
        token_version=Ragged.of([row.token_version for row in rows], torch.int64),
        episode_rewards=torch.tensor([row.episode_rewards for row in rows]),
        episode_metrics=[row.episode_metrics for row in rows],
    )
