"""The policy losses, per token, by name: POLICY_LOSSES.

A policy loss is a function (tokens, config) -> (losses, metrics), both per token, [tokens]; @reads
says which settings and columns it reads. policy.py weighs and sums the losses, adds entropy, KL and
the rollout correction, and measures what all losses have in common. hybridflow/registry.py says how
other packages bring losses of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.registry import Registry
from workers.losses.config import PolicyLossConfig
from workers.losses.segments import segment_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTokens:
    """The counted tokens of whole rows."""

    log_probs: Tensor
    """[tokens], with a gradient."""
    log_ratio: Tensor
    """[tokens], log_probs - old_log_probs, clamped to what exp can bear (workers/losses/kl.py);
    with a gradient."""
    advantages: Tensor
    """[tokens]."""
    row: Tensor
    """int64 [tokens]."""
    num_rows: int
    columns: Mapping[str, Tensor]
    """[tokens] each: the further columns that the loss reads, by name."""


SELECTED = "covariance_selected"
"""bool column: the tokens that clip_cov and kl_cov act on (controllers/covariance.py)."""

PolicyLossFunction = Callable[[PolicyTokens, PolicyLossConfig], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy loss and what it reads; called like its function."""

    function: PolicyLossFunction
    settings: tuple[str, ...]
    """Fields of PolicyLossConfig: setting any other one that only some losses read is refused."""
    columns: tuple[str, ...]
    """Per-token columns of the batch, beside advantages and log-probs: an algorithm that does
    not write them is refused."""

    def __call__(
        self, tokens: PolicyTokens, config: PolicyLossConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(tokens, config)


def reads(
    *settings: str, columns: tuple[str, ...] = ()
) -> Callable[[PolicyLossFunction], PolicyLoss]:
    """Turns a function into a PolicyLoss that reads these settings and columns.

    @reads("clip_low")
    def my_loss(tokens, config): ...
    """
    unknown = [name for name in settings if name not in PolicyLossConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(
            f"@reads: {', '.join(unknown)} is no setting of a policy loss; known: "
            f"{', '.join(PolicyLossConfig.__dataclass_fields__)}"
        )

    def wrap(function: PolicyLossFunction) -> PolicyLoss:
        return PolicyLoss(function, settings, columns)

    return wrap


@reads("clip_low", "clip_high", "dual_clip")
def ppo_clip(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r) A), r = pi / pi_old (Schulman et al. 2017, eq. 7), with two bounds (DAPO,
    eq. 8) and dual clipping (Ye et al. 2020: for A < 0 the loss is at most -c A).

    Clip fractions count tokens whose gradient the clip removes (TRL does the same; verl adds both
    sides up in one number).
    """
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, config, dual_clip=config.dual_clip)


@reads("clip_low", "clip_high")
def gspo(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clip of the sequence ratio s = exp(mean log ratio of the row) (Zheng et al. 2025, eq.
    7), in GSPO-token's form (eq. 13, 14): r = sg[s] pi / sg[pi], so that every token has its own
    advantage; equal to GSPO when a row's advantages are.

    Its papers' aggregation is seq_mean_token_mean; ours is the configured one (verl always takes
    seq-mean-token-mean). The mean is over a row's counted tokens.
    """
    sequence = segment_mean(tokens.log_ratio.detach(), tokens.row, tokens.num_rows)[tokens.row]
    ratio = (tokens.log_probs - tokens.log_probs.detach() + sequence).exp()
    losses, metrics = _clipped(ratio, tokens.advantages, config, dual_clip=0.0)
    return losses, {**metrics, "sequence_ratio_mean": ratio.detach()}


@reads("clip_low", "clip_high")
def cispo(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg[clip(r)] A log pi: clips the importance weight and keeps every token's gradient
    (MiniMax-M1, 2025, eq. 4 and 5).

    The paper tunes the upper bound only; so does TRL, which has no lower one (clip_low = 1 here).
    """
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    metrics = {
        "clip_fraction_low": ratio < 1 - config.clip_low,
        "clip_fraction_high": ratio > 1 + config.clip_high,
    }
    return -weight * tokens.advantages * tokens.log_probs, metrics


@reads()
def policy_gradient(
    tokens: PolicyTokens, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log pi (REINFORCE): right for one update per batch, and blind to how far the policy
    has moved since."""
    return -tokens.advantages * tokens.log_probs, {}


@reads("clip_low", "clip_high", columns=(SELECTED,))
def clip_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clip, and no gradient from the selected tokens: few of those whose advantage and
    log-prob go together most, which lower the entropy most (Cui et al. 2025, "The Entropy Mechanism
    of Reinforcement Learning").

    The selection is a column that was made over the whole batch (controllers/covariance.py), from
    the old log-probs. The authors' code and verl select inside each micro-batch, with the current
    ones, and never a token that PPO clips: their loss depends on the cut.
    """
    losses, metrics = _clipped(tokens.log_ratio.exp(), tokens.advantages, config, dual_clip=0.0)
    selected = tokens.columns[SELECTED]
    return torch.where(selected, 0.0, losses), {**metrics, "covariance_fraction": selected}


@reads("kl_cov_coefficient", columns=(SELECTED,))
def kl_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-r A without a clip, plus kl_cov_coefficient |log r| on the selected tokens (Cui et al.
    2025); selection as in clip_cov.

    |log r| has gradient 0 at r = 1: the penalty acts from a batch's second update on.
    """
    selected = tokens.columns[SELECTED]
    losses = -tokens.advantages * tokens.log_ratio.exp()
    penalty = config.kl_cov_coefficient * tokens.log_ratio.abs()
    return losses + torch.where(selected, penalty, 0.0), {"covariance_fraction": selected}


POLICY_LOSSES = Registry(
    group="hybridflow.policy_losses",
    builtin={
        "ppo_clip": f"{__name__}:ppo_clip",
        "gspo": f"{__name__}:gspo",
        "cispo": f"{__name__}:cispo",
        "clip_cov": f"{__name__}:clip_cov",
        "kl_cov": f"{__name__}:kl_cov",
        "policy_gradient": f"{__name__}:policy_gradient",
    },
)


def surrogate(name: str) -> PolicyLoss:
    """The policy loss that actor.loss.name names; a ValueError if there is none."""
    loss = POLICY_LOSSES.load(name, "actor.loss.name")
    if not isinstance(loss, PolicyLoss):
        raise ValueError(
            f"actor.loss.name is {name!r}, which is no policy loss; mark the function with @reads "
            "(workers/losses/surrogates.py)"
        )
    return loss


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
