"""The coefficient of the KL in the reward, fixed or adaptive, and the KL that steers it.

The per-token estimators stand in workers/losses/kl.py, because the losses use them too. A KL in the
loss has a fixed coefficient (PolicyLossConfig.kl_coefficient).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridflow.batch import Batch
from workers.losses.kl import KLEstimator, kl_estimate
from workers.losses.segments import row_of_token, segment_sum

__all__ = ["KLCoefficient", "KLControlConfig", "KLEstimator", "kl_estimate", "sequence_kl"]

MAX_ERROR = 0.2
"""Ziegler et al. clip the relative error to this, so that one odd batch moves the coefficient
little."""


@dataclass(kw_only=True)
class KLControlConfig:
    """Settings of the KL penalty in the reward."""

    coefficient: float = 0.0
    """beta, or its start value if it is adaptive; 0 turns the KL in the reward off."""
    estimator: KLEstimator = KLEstimator.k1
    target: float = 0.0
    """Adaptive: the KL per response to hold, in nats (Ziegler et al.: 6); 0 keeps the
    coefficient fixed."""
    horizon: int = 10_000
    """Adaptive: responses in which the coefficient moves by at most a fifth."""

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(
                f"algorithm.kl.coefficient is {self.coefficient}; choose more than 0, or 0 for no "
                "KL in the reward"
            )
        if self.target < 0 or self.horizon < 1:
            raise ValueError(
                f"algorithm.kl.target is {self.target} and algorithm.kl.horizon {self.horizon}; "
                "choose target >= 0 (0: fixed) and horizon >= 1"
            )
        if self.target and not self.coefficient:
            raise ValueError(
                f"algorithm.kl.target is {self.target}, but algorithm.kl.coefficient is 0 and "
                "would stay 0; choose a start value (0.1, say)"
            )


class KLCoefficient:
    """coefficient = KLCoefficient(config)
    rewards, lengths = rewards_with_kl(batch, coefficient.value, config.estimator)
    coefficient.follow(batch)
    coefficient.metrics()   # {"kl/coefficient": 0.05}
    """

    def __init__(self, config: KLControlConfig) -> None:
        self.config = config
        self.value = config.coefficient
        """The coefficient of the next rewards."""
        self.used = config.coefficient
        """The coefficient of the latest rewards."""

    def update(self, kl: float, num_rows: int) -> None:
        """beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_rows / horizon (Ziegler et al. 2019,
        section 2.2, with the factor per response of their code); nothing if fixed.

        kl: mean over responses of the sum over tokens (as in the paper and TRL; verl steers by a
        mean over tokens, whose target is smaller by the length). num_rows: responses that it was
        measured on.
        """
        self.used = self.value
        if self.config.target:
            error = min(max(kl / self.config.target - 1, -MAX_ERROR), MAX_ERROR)
            self.value *= 1 + error * num_rows / self.config.horizon

    def follow(self, batch: Batch) -> None:
        """update() by the columns rollout_log_probs and ref_log_probs of a batch; nothing without a
        reference or rows."""
        if self.config.target and batch and "ref_log_probs" in batch:
            log_probs = batch.ragged("rollout_log_probs")
            ref_log_probs = batch.ragged("ref_log_probs")
            self.update(
                float(
                    sequence_kl(log_probs.values, ref_log_probs.values, log_probs.lengths).mean()
                ),
                len(batch),
            )

    def metrics(self) -> dict[str, float]:
        """The coefficient that the latest rewards hold; nothing without a KL in the reward."""
        if not self.config.coefficient:
            return {}
        return {"kl/coefficient": self.used}

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = self.used = state["value"]


def sequence_kl(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    lengths: Tensor,
    estimator: KLEstimator = KLEstimator.k1,
) -> Tensor:
    """[rows]: the KL of each response to the reference, summed over its tokens, in nats."""
    return segment_sum(
        kl_estimate(log_probs, ref_log_probs, estimator), row_of_token(lengths), len(lengths)
    )
