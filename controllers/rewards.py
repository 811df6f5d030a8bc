"""Rewards per token from scores per response, and the responses that are worth training on.

Tensors are flat over response tokens [scored_tokens], rows in order, with `lengths` int64 [rows].
Leaves out where scores come from (workers) and what becomes of rewards (advantages.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from controllers.kl import KLEstimator, kl_estimate
from hybridflow.batch import Batch
from workers.losses.segments import row_of_token, segment_sum


def token_rewards(
    scores: Tensor,
    lengths: Tensor,
    log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    estimator: KLEstimator = KLEstimator.k1,
) -> Tensor:
    """float [scored_tokens]: -beta KL_t on every token, plus the row's score on its last one
    (InstructGPT, section 3.5).

    scores: [rows]. log_probs, ref_log_probs: [scored_tokens], needed if kl_coefficient is not 0.
    The last token is the end of sequence, or the last one before the length limit (so do verl and
    OpenRLHF; TRL can subtract a missing_eos_penalty, here overlong_penalty). A row without tokens
    has nothing to reward: its score appears nowhere. Safe-RLHF splits the KL: kl_coefficient =
    beta/2 for rewards and -beta/2 for costs.
    """
    if kl_coefficient:
        if log_probs is None or ref_log_probs is None:
            raise ValueError(
                f"token rewards: kl_coefficient is {kl_coefficient}, so log_probs and "
                "ref_log_probs are needed; give both"
            )
        rewards = -kl_coefficient * kl_estimate(log_probs, ref_log_probs, estimator)
    else:
        rewards = scores.new_zeros(int(lengths.sum()))
    last = torch.cumsum(lengths, 0) - 1
    filled = lengths > 0
    return rewards.index_add(0, last[filled], scores[filled].to(rewards.dtype))


def rewards_with_kl(
    batch: Batch, coefficient: float, estimator: KLEstimator, scores: str = "rewards"
) -> tuple[Tensor, Tensor]:
    """(token_rewards of the batch [scored_tokens], lengths [rows]), from the column `scores`,
    rollout_log_probs and, where there is a reference, ref_log_probs. What single turns earned of
    `rewards` (turn_rewards) stands at the last token of each turn, the rest at the row's."""
    log_probs = batch.ragged("rollout_log_probs")
    lengths, of_rows = log_probs.lengths, batch.tensor(scores)
    if scores == "rewards" and "turn_rewards" in batch:
        turns = batch.ragged("turn_rewards")
        of_rows = of_rows - segment_sum(turns.values, row_of_token(turns.lengths), len(batch))
    if "ref_log_probs" in batch:
        ref_log_probs = batch.ragged("ref_log_probs").values
        rewards = token_rewards(
            of_rows, lengths, log_probs.values, ref_log_probs, coefficient, estimator
        )
    else:
        rewards = token_rewards(of_rows, lengths)
    if scores == "rewards" and "turn_rewards" in batch:
        ends = torch.cumsum(batch.ragged("turn_lengths").values, 0) - 1
        rewards = rewards.index_add(0, ends, turns.values)
    return rewards, lengths


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """float32 [rows], to add to the scores: 0 up to max_length - buffer tokens, then falling
    linearly to -1 at max_length, and -1 beyond (DAPO, eq. 13, soft overlong punishment).

    verl multiplies it with a penalty factor (1 by default): multiply the result.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong buffer is {buffer} tokens; choose 0 < buffer <= max_length ({max_length})"
        )
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1.0, 0.0)


def groups_with_signal(scores: Tensor, uid: Tensor, tolerance: float = 1e-6) -> Tensor:
    """bool [rows]: True for rows of groups (equal uid, int64 [rows]) whose scores differ (DAPO,
    dynamic sampling, eq. 11).

    DAPO asks for 0 < correct < group size, the same for scores of two values; like verl we look at
    the spread of any score (verl: of a metric by name). A group of one has no signal (verl keeps
    it).
    """
    _, group, size = torch.unique(uid, return_inverse=True, return_counts=True)
    num_groups = len(size)
    lowest = scores.new_zeros(num_groups).scatter_reduce(
        0, group, scores, "amin", include_self=False
    )
    highest = scores.new_zeros(num_groups).scatter_reduce(
        0, group, scores, "amax", include_self=False
    )
    return (highest - lowest > tolerance)[group]
