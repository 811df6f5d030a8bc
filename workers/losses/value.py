"""The critic's loss: half the squared error to the returns, clipped around the rollout's values.

Reads per-token columns returns, weights, and values (those of the rollout; only for clipping).
Leaves out how returns are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.base import LossFn, Outputs
from workers.losses.config import ValueLossConfig
from workers.losses.reduction import Counted, LossMetrics, column, required
from workers.sequences import Sequences


def value_loss(config: ValueLossConfig) -> LossFn:
    """max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2 per token.

    PPO's paper (eq. 9) has (V - R)^2, neither halved nor clipped; the clip comes from OpenAI's
    baselines, where the half comes from too; OpenRLHF, TRL and verl do both. Without a column
    values the old values are the current ones, detached.
    """

    def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
        counted = Counted.of(sequences)
        values = counted.take(required(outputs.values, "values"))
        returns = counted.take(column(sequences, "returns"))
        squared_error = (values - returns).square()
        clipped_fraction = torch.zeros_like(squared_error)
        if config.clip:
            old_values = (
                counted.take(sequences.per_token["values"])
                if "values" in sequences.per_token
                else values.detach()
            )
            clipped = (
                old_values + (values - old_values).clamp(-config.clip, config.clip) - returns
            ).square()
            clipped_fraction = clipped > squared_error
            squared_error = torch.maximum(squared_error, clipped)
        loss = counted.weighted_sum(0.5 * squared_error)
        return loss, {
            "value_loss": loss.detach(),
            "value_clip_fraction": counted.mean(clipped_fraction),
            "value_mean": counted.mean(values),
            **_moments(counted, values, returns),
        }

    return loss_fn


def _moments(counted: Counted, values: Tensor, returns: Tensor) -> LossMetrics:
    """Means and mean squares, from which reduction.derived_metrics makes the explained variance of
    the whole mini-batch.

    In float64, because a variance is a small difference of them when the mean is large.
    """
    error, returns = (returns - values).double(), returns.double()
    return {
        "return_mean": counted.mean(returns),
        "return_squared": counted.mean(returns.square()),
        "value_error": counted.mean(error),
        "value_error_squared": counted.mean(error.square()),
    }
