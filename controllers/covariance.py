"""Selects the tokens that clip_cov and kl_cov act on: the column covariance_selected of the whole
batch.

A token's covariance is (log_prob - mean log_prob) (advantage - mean advantage), means over all
tokens (Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning"). We take the old
log-probs, so that the selection can be made before any update and does not depend on how the batch
is cut; the authors' code and verl take the current ones inside each micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_for_clip_cov(
    advantages: Tensor,
    old_log_probs: Tensor,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    seed: int,
) -> Tensor:
    """bool [scored_tokens]: a random `fraction` of all tokens (at least one), out of those with
    covariance between low and high.

    Defaults as in the authors' code. Fewer, if there are not so many; none, if there is none.
    """
    covariance = _covariance(advantages, old_log_probs)
    candidates = torch.nonzero((covariance > low) & (covariance < high)).squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return _mark(len(advantages), candidates[order[: _number(fraction, len(advantages))]])


def select_for_kl_cov(
    advantages: Tensor, old_log_probs: Tensor, *, fraction: float = 2e-4
) -> Tensor:
    """bool [scored_tokens]: the `fraction` of all tokens (at least one) with the largest
    covariance."""
    covariance = _covariance(advantages, old_log_probs)
    number = min(_number(fraction, len(advantages)), len(advantages))
    return _mark(len(advantages), torch.topk(covariance, number).indices)


def _covariance(advantages: Tensor, log_probs: Tensor) -> Tensor:
    return (log_probs.double() - log_probs.double().mean()) * (
        advantages.double() - advantages.double().mean()
    )


def _number(fraction: float, num_tokens: int) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"covariance fraction is {fraction}; choose 0 < fraction <= 1 (2e-4 in the paper's "
            "code)"
        )
    return max(1, int(fraction * num_tokens))


def _mark(length: int, index: Tensor) -> Tensor:
    selected = torch.zeros(length, dtype=torch.bool)
    selected[index] = True
    return selected
