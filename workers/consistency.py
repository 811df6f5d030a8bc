"""Consistency: checks in every run the first optimizer step of an update on fresh samples.

The policy that is trained is then still the policy that sampled: the ratio of every token is 1, the
approximate KL is 0, and the trainer's log-probs are those of the generation engine, all up to
rounding. Where they are not, the step does not optimise the loss that it claims to: other weights,
another temperature, a shifted column, a layout that changes the result. Later steps and stale rows
are not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import isfinite

from workers.config import Precision
from workers.role_config import ActorConfig, Consistency

LOGGER = logging.getLogger(__name__)
FP32_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.05


def is_exact(config: ActorConfig) -> bool:
    """Whether both sides compute in float32: then the worst token is held to the tolerance,
    otherwise the mean."""
    return (
        config.train.precision is Precision.fp32 and config.generation.precision is Precision.fp32
    )


def tolerance_of(config: ActorConfig) -> float:
    if config.consistency_tolerance >= 0:
        return config.consistency_tolerance
    return FP32_TOLERANCE if is_exact(config) else BF16_TOLERANCE


def check_first_step(
    metrics: Mapping[str, float], config: ActorConfig, *, reports: bool
) -> dict[str, float]:
    """The metric consistency_violations, after a RuntimeError or a warning (on the rank that
    `reports`) that names the violations.

    `metrics` are policy_loss's for the step: the same on every rank, so that all ranks raise
    together.
    """
    if config.consistency is Consistency.off:
        return {}
    violations = list(find_violations(metrics, tolerance_of(config), exact=is_exact(config)))
    if violations:
        text = (
            f"first optimizer step on fresh samples: {'; '.join(violations)}. The trainer does "
            "not compute what was sampled: compare temperature, precision and attention of the "
            "two engines, and look for code between sampling and update that changes columns or "
            "weights. If rounding explains it, raise actor.consistency_tolerance"
        )
        if config.consistency is Consistency.error:
            raise RuntimeError(
                f"{text} (actor.consistency=error stops the run before the new weights are used)"
            )
        if reports:
            LOGGER.warning("actor: %s", text)
    return {"consistency_violations": float(len(violations))}


def find_violations(metrics: Mapping[str, float], tolerance: float, *, exact: bool) -> list[str]:
    """A line per measure that exceeds the tolerance, of those that the metrics hold.

    A maximum over no tokens is infinite and is not counted.
    """
    measured: dict[str, float] = {}
    kl = abs(metrics.get("approx_kl_k1", 0.0))
    if exact:
        largest = 0.0
        for ratio in (metrics.get("ratio_max", 1.0), metrics.get("ratio_min", 1.0)):
            if isfinite(ratio):
                largest = max(largest, abs(ratio - 1))
        measured["largest |ratio - 1|"] = largest
        measured["|approximate KL|"] = kl
        # The gap's maximum over no tokens is -infinity.
        measured["largest gap to the generation engine's log-probs"] = metrics.get(
            "log_prob_gap_max", 0.0
        )
    else:
        if isfinite(metrics.get("ratio_max", -float("inf"))):
            measured["|mean ratio - 1|"] = abs(metrics.get("ratio_mean", 1.0) - 1)
        measured["|approximate KL|"] = kl
        measured["mean gap to the generation engine's log-probs"] = metrics.get(
            "log_prob_gap_mean", 0.0
        )
    violations = []
    for name, value in measured.items():
        if not value <= tolerance:
            violations.append(f"{name} is {value:.3g}, over {tolerance:.3g}")
    return violations
