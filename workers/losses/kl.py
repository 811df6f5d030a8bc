"""Estimators of the reverse KL divergence KL(policy || reference) from the log-probs of tokens that
the policy sampled.

With d = log_prob - ref_log_prob (Schulman, "Approximating KL divergence", 2020):

| name | value        | as a value                        | its gradient, if it stands in the loss
|------|--------------|-----------------------------------|---------------------------------------
| k1   | d            | unbiased, can be negative         | 0 in expectation: it only adds noise
| abs  | abs(d)       | biased, an upper bound of k1      | pulls every token back equally hard
| k2   | d^2 / 2      | biased, low variance              | that of the reverse KL, on policy
| k3   | e^-d + d - 1 | unbiased, never negative          | that of the forward KL, on policy

The forward KL is KL(reference || policy).

So k1 belongs into the reward (InstructGPT, OpenRLHF, TRL's PPO), k2 or k3 into the loss (GRPO's
paper, eq. 4, uses k3; REINFORCE++ recommends k2). Others: verl calls them kl, abs, mse, low_var_kl,
clamps d to +-20 and then k3's value to +-10; OpenRLHF clamps every estimate to +-10. Leaves out KL
over the whole vocabulary, and the coefficient (controllers/kl.py).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest |log ratio| that is put through exp, here and in the policy losses: e^20 = 4.9e8 is
finite in float32, and so are its products with advantages. Beyond it a token gets no gradient;
the policy loss reports the fraction."""


class KLEstimator(StrEnum):
    k1 = "k1"
    abs = "abs"
    """|k1|."""
    k2 = "k2"
    k3 = "k3"


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per token, any shape; differentiable in both. k3 clamps d to +-MAX_LOG_RATIO."""
    difference = log_probs - ref_log_probs
    match estimator:
        case KLEstimator.k1:
            return difference
        case KLEstimator.abs:
            return difference.abs()
        case KLEstimator.k2:
            return 0.5 * difference.square()
        case KLEstimator.k3:
            # expm1 keeps the digits of a small difference, where exp(-d) - 1 would cancel.
            difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return torch.expm1(-difference) + difference
    raise ValueError(f"kl estimator: {estimator!r} is unknown; known: {', '.join(KLEstimator)}")
