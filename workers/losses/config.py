"""Settings of the losses: fields, defaults and docs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from workers.losses.aggregation import Aggregation
from workers.losses.kl import KLEstimator


class Correction(StrEnum):
    """Use of the importance weight w = pi_old / pi_rollout between training and generation
    engine in a token's policy loss."""

    none = "none"
    truncate = "truncate"
    """Multiply by min(w, max_ratio): truncated importance sampling."""
    mask = "mask"
    """Multiply by w where min_ratio <= w <= max_ratio, by 0 elsewhere: masked importance
    sampling."""


class CorrectionLevel(StrEnum):
    """Over what w is taken."""

    token = "token"
    sequence = "sequence"
    """The product over a row's tokens, for each of them: unbiased for whole responses, with large
    variance.
   """
    sequence_mean = "sequence_mean"
    """Its geometric mean: does not grow with the length."""


class OldPolicy(StrEnum):
    """The policy that the ratio of the policy loss is taken to, where it is not the present one."""

    recomputed = "recomputed"
    """The trainer's weights before the update: another forward pass, where they are not those of
    the first step."""
    rollout = "rollout"
    """The policy that drew the response, by the generation engine's log-probs: no other pass, and
    the clip bounds how far stale responses can push."""


@dataclass(kw_only=True)
class RolloutCorrectionConfig:
    """Needs the column rollout_log_probs."""

    correction: Correction = Correction.none
    level: CorrectionLevel = CorrectionLevel.token
    min_ratio: float = 0.5
    """Bound of w, for mask."""
    max_ratio: float = 2.0
    """Bound of w, for truncate and mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_ratio < 1 < self.max_ratio:
            raise ValueError(
                f"actor.loss.rollout_correction: min_ratio {self.min_ratio} and max_ratio "
                f"{self.max_ratio} must enclose 1 (equal engines); choose 0 <= min_ratio < 1 < "
                "max_ratio"
            )


@dataclass(kw_only=True)
class PolicyLossConfig:
    """The actor's loss."""

    name: str = "ppo_clip"
    """ppo_clip, gspo, cispo, clip_cov, kl_cov or policy_gradient
    (workers/losses/surrogates.py), or one of another package: a name that it declares, or
    package.module:name."""
    clip_low: float = 0.2
    """The ratio is clipped to at least 1 - clip_low. GSPO's paper: 3e-4. CISPO's paper has no lower
    bound: 1.
   """
    clip_high: float = 0.2
    """... and at most 1 + clip_high. DAPO's clip-higher: 0.28. GSPO's paper: 4e-4."""
    dual_clip: float = 0.0
    """ppo_clip: bound of the ratio for negative advantages, above 1 (3 in its paper and in
    verl); 0 turns it off."""
    kl_cov_coefficient: float = 1.0
    """kl_cov: coefficient of |log ratio| on the selected tokens."""
    aggregation: Aggregation = Aggregation.token_mean
    aggregation_constant: int = 0
    """aggregation constant (Dr.GRPO): the longest response allowed, in tokens."""
    entropy_coefficient: float = 0.0
    """Coefficient of the entropy bonus; not 0 needs an engine called with entropy=True."""
    kl_coefficient: float = 0.0
    """Coefficient of the KL to the reference in the loss; not 0 needs the column ref_log_probs."""
    kl_estimator: KLEstimator = KLEstimator.k3
    pretraining_coefficient: float = 16.0
    """Coefficient of the language loss on rows of data.pretraining (PPO-ptx; Safe-RLHF's 16,
    InstructGPT's 27.8)."""
    old_policy: OldPolicy = OldPolicy.recomputed
    """The policy that the ratio is taken to."""
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"actor.loss.clip_low is {self.clip_low}; the ratio is clipped to 1 - clip_low, "
                "so choose 0 <= clip_low <= 1"
            )
        if self.clip_high < 0:
            raise ValueError(
                f"actor.loss.clip_high is {self.clip_high}; the ratio is clipped to 1 + "
                "clip_high, so choose at least 0"
            )
        if self.dual_clip != 0 and self.dual_clip <= 1:
            raise ValueError(
                f"actor.loss.dual_clip is {self.dual_clip}; it bounds the ratio from above, so "
                "choose more than 1, or 0 for off"
            )
        if self.aggregation is Aggregation.constant and self.aggregation_constant < 1:
            raise ValueError(
                f"actor.loss.aggregation_constant is {self.aggregation_constant}; aggregation "
                "'constant' needs the longest response allowed, in tokens"
            )
        for name in ("kl_coefficient", "kl_cov_coefficient", "pretraining_coefficient"):
            if vars(self)[name] < 0:
                raise ValueError(f"actor.loss.{name} is {vars(self)[name]}; use 0 or more")


@dataclass(kw_only=True)
class ValueLossConfig:
    """The critic's loss."""

    clip: float = 0.2
    """The value may move this far from the rollout's value before its gradient stops; 0 turns
    clipping off.
   """
    aggregation: Aggregation = Aggregation.token_mean
    aggregation_constant: int = 0
    """aggregation constant: the longest response allowed, in tokens."""

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise ValueError(
                f"critic.loss.clip is {self.clip}; choose more than 0, or 0 for an unclipped "
                "value loss"
            )
        if self.aggregation is Aggregation.constant and self.aggregation_constant < 1:
            raise ValueError(
                f"critic.loss.aggregation_constant is {self.aggregation_constant}; aggregation "
                "'constant' needs the longest response allowed, in tokens"
            )


@dataclass(kw_only=True)
class DPOLossConfig:
    beta: float = 0.1
    """Strength of the implicit KL constraint."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels (conservative DPO)."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(
                f"algorithm.loss.beta is {self.beta}; it scales the log-ratio to the reference: "
                "choose more than 0 (0.1)"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"algorithm.loss.label_smoothing is {self.label_smoothing}; choose 0 <= "
                "label_smoothing < 0.5"
            )
