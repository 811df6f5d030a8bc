"""The beginning and end of every token-level loss: the counted tokens of a micro-batch, and metrics
that add up.

LossMetrics come in three kinds, told apart by their names. A name ending in `_max` (`_min`) is a
maximum (minimum), -inf (+inf) standing for "no token"; every other metric is a sum with global
weights. Engines combine them over micro-batches and ranks (workers/engines/shared/metrics.py), sums
in float64 because variances are computed from some. What is neither comes afterwards, from
derived_metrics. LossMetrics carry no gradient and have the same names for every micro-batch, an
empty one too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.sequences import Sequences

LossMetrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """The scored tokens that count (weight not 0); what follows never needs a mask.

    counted = Counted.of(sequences)
    log_probs = counted.take(outputs.log_probs)
    loss = counted.weighted_sum(-log_probs)
    metrics = {"nll": counted.mean(-log_probs), "nll_max": maximum(-log_probs)}
    """

    index: Tensor
    """int64 [counted], positions among the scored tokens."""
    weights: Tensor
    """[counted], of the loss."""
    mean_weights: Tensor
    """[counted], of metrics."""
    row: Tensor
    """int64 [counted], the micro-batch's row of every token."""
    num_rows: int

    @classmethod
    def of(cls, sequences: Sequences) -> Counted:
        """Reads the columns weights and mean_weights (workers/losses/aggregation.py).

        Without mean_weights the metrics are weighted as the loss is: a mean too under token_mean
        and seq_mean_token_mean, not under the other aggregations.
        """
        weights = column(sequences, "weights")
        index = sequences.counted
        if index is None:
            index = torch.nonzero(weights).squeeze(1)
        row = sequences.row_of_token.to(weights.device)
        mean_weights = sequences.per_token.get("mean_weights", weights)
        return cls(
            index=index,
            weights=weights[index],
            mean_weights=mean_weights[index],
            row=row[index],
            num_rows=sequences.num_rows,
        )

    def take(self, values: Tensor) -> Tensor:
        """[scored_tokens] -> [counted]."""
        return values[self.index]

    def weighted_sum(self, values: Tensor) -> Tensor:
        """The loss of [counted] per-token losses."""
        return (self.weights * values).sum()

    def mean(self, values: Tensor) -> Tensor:
        """The micro-batch's part of the mean of [counted] (bool too) over all tokens of the
        mini-batch."""
        values = values.detach()
        return (
            self.mean_weights
            * values.to(torch.promote_types(values.dtype, self.mean_weights.dtype))
        ).sum()


def column(sequences: Sequences, name: str) -> Tensor:
    """A per-token column, [scored_tokens]."""
    if name not in sequences.per_token:
        raise ValueError(
            f"loss: per-token column {name!r} is missing; the micro-batch has "
            f"{sorted(sequences.per_token)}"
        )
    return sequences.per_token[name]


def row_column(sequences: Sequences, name: str) -> Tensor:
    """A per-row column, [rows]."""
    if name not in sequences.per_row:
        raise ValueError(
            f"loss: per-row column {name!r} is missing; the micro-batch has "
            f"{sorted(sequences.per_row)}"
        )
    return sequences.per_row[name]


def required(output: Tensor | None, name: str) -> Tensor:
    """An output of the engine that the loss cannot do without."""
    if output is None:
        raise ValueError(
            f"loss: the engine gave no {name}; choose the head (or entropy=True) that computes it"
        )
    return output


def maximum(values: Tensor) -> Tensor:
    """Over all elements; -inf if there are none."""
    values = values.detach()
    return torch.cat([values.reshape(-1), values.new_full((1,), -math.inf)]).amax()


def minimum(values: Tensor) -> Tensor:
    """Over all elements; +inf if there are none."""
    return -maximum(-values)


def derived_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are no sums, from those of a whole mini-batch: call it on what
    TrainingEngine.train_step returned.

    explained_variance: 1 - Var(returns - values) / Var(returns), from the means of both and of
    their squares (value_loss); NaN if the returns do not vary. rollout_effective_sample_fraction:
    E[w]^2 / E[w^2] of the importance weights between generation and training (1: no gap).
    perplexity: e^nll.
    """
    derived: dict[str, float] = {}
    if "value_error_squared" in metrics:
        error_variance = metrics["value_error_squared"] - metrics["value_error"] ** 2
        return_variance = metrics["return_squared"] - metrics["return_mean"] ** 2
        derived["explained_variance"] = (
            1 - error_variance / return_variance if return_variance > 0 else math.nan
        )
    if metrics.get("rollout_ratio_squared"):
        derived["rollout_effective_sample_fraction"] = (
            metrics["rollout_ratio_mean"] ** 2 / metrics["rollout_ratio_squared"]
        )
    if "nll" in metrics:
        derived["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return derived
