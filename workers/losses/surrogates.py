"""The policy losses, per token: POLICY_LOSSES maps a name to a function (tokens, config) -> (losses,
metrics).

Both are per token, [tokens]: policy.py weighs and sums them, adds entropy, KL and the rollout correction, and
measures what all losses have in common. A new policy loss is a function here and a line in the dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.losses.config import PolicyLossConfig
from workers.losses.segments import segment_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTokens:
    """The counted tokens of whole rows."""

    log_probs: Tensor
    """[tokens], with a gradient."""
    log_ratio: Tensor
    """[tokens], log_probs - old_log_probs, clamped to what exp can bear (workers/losses/kl.py); with a
    gradient."""
    advantages: Tensor
    """[tokens]."""
    row: Tensor
    """int64 [tokens]."""
    num_rows: int
    covariance_selected: Tensor | None
    """bool [tokens], for clip_cov and kl_cov."""


PolicyLoss = Callable[[PolicyTokens, PolicyLossConfig], tuple[Tensor, dict[str, Tensor]]]


def ppo_clip(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r) A), r = pi / pi_old (Schulman et al. 2017, eq. 7), with two bounds (DAPO, eq. 8) and
    dual clipping (Ye et al. 2020: for A < 0 the loss is at most -c A).

    Clip fractions count tokens whose gradient the clip removes (TRL does the same; verl adds both sides up in
    one number).
    """
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, config, dual_clip=config.dual_clip)


def gspo(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clip of the sequence ratio s = exp(mean log ratio of the row) (Zheng et al. 2025, eq. 7), in
    GSPO-token's form (eq. 13, 14): r = sg[s] pi / sg[pi], so that every token has its own advantage; equal to
    GSPO when a row's advantages are.

    Its papers' aggregation is seq_mean_token_mean; ours is the configured one (verl always takes
    seq-mean-token-mean). The mean is over a row's counted tokens.
    """
    sequence = segment_mean(tokens.log_ratio.detach(), tokens.row, tokens.num_rows)[tokens.row]
    ratio = (tokens.log_probs - tokens.log_probs.detach() + sequence).exp()
    losses, metrics = _clipped(ratio, tokens.advantages, config, dual_clip=0.0)
    return losses, {**metrics, "sequence_ratio_mean": ratio.detach()}


def cispo(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg[clip(r)] A log pi: clips the importance weight and keeps every token's gradient (MiniMax-M1, 2025,
    eq. 4 and 5).

    The paper tunes the upper bound only; so does TRL, which has no lower one (clip_low = 1 here).
    """
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    metrics = {
        "clip_fraction_low": ratio < 1 - config.clip_low,
        "clip_fraction_high": ratio > 1 + config.clip_high,
    }
    return -weight * tokens.advantages * tokens.log_probs, metrics


def policy_gradient(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log pi (REINFORCE): right for one update per batch, and blind to how far the policy has moved
    since."""
    return -tokens.advantages * tokens.log_probs, {}


def clip_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clip, and no gradient from the selected tokens: few of those whose advantage and log-prob go
    together most, which lower the entropy most (Cui et al. 2025, "The Entropy Mechanism of Reinforcement
    Learning").

    The selection is a column that was made over the whole batch (controllers/covariance.py), from the old
    log-probs. The authors' code and verl select inside each micro-batch, with the current ones, and never a
    token that PPO clips: their loss depends on the cut.
    """
    losses, metrics = _clipped(tokens.log_ratio.exp(), tokens.advantages, config, dual_clip=0.0)
    selected = _selected(tokens, "clip_cov")
    return torch.where(selected, 0.0, losses), {**metrics, "covariance_fraction": selected}


def kl_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-r A without a clip, plus kl_cov_coefficient |log r| on the selected tokens (Cui et al. 2025);
    selection as in clip_cov.

    |log r| has gradient 0 at r = 1: the penalty acts from a batch's second update on.
    """
    selected = _selected(tokens, "kl_cov")
    losses = -tokens.advantages * tokens.log_ratio.exp()
    penalty = config.kl_cov_coefficient * tokens.log_ratio.abs()
    return losses + torch.where(selected, penalty, 0.0), {"covariance_fraction": selected}


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "policy_gradient": policy_gradient,
}


def _clipped(
    ratio: Tensor, advantages: Tensor, config: PolicyLossConfig, *, dual_clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(unclipped, clipped)
    active = clipped > unclipped
    metrics = {
        "clip_fraction_low": active & (advantages < 0),
        "clip_fraction_high": active & (advantages > 0),
    }
    if dual_clip:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (losses > bound)
        losses = torch.where(beyond, bound, losses)
        metrics["dual_clip_fraction"] = beyond
    return losses, metrics


def _selected(tokens: PolicyTokens, name: str) -> Tensor:
    if tokens.covariance_selected is None:
        raise ValueError(
            f"loss {name}: per-token column 'covariance_selected' is missing; make it with "
            "controllers/covariance.py"
        )
    return tokens.covariance_selected
