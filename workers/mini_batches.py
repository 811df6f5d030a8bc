"""MiniBatches: the optimizer steps of one update, and the loop and the metrics over them.

Which rows form a mini-batch was decided for the whole batch (column mini_batch), so it does not
depend on the layout. How a mini-batch is cut into micro-batches is left to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.errors import NotFiniteError
from hybridflow.layout import Layout
from hybridflow.results import Metrics, prefixed
from workers.columns import PRETRAIN
from workers.engines.base import LossFn, TrainingEngine
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.losses.reduction import derived_metrics
from workers.not_finite import NOT_FINITE, NotFinite
from workers.sequences import Sequences


class MiniBatches:
    """mini_batches = MiniBatches(sequences, labels, layout, device)
    steps = mini_batches.steps(num_epochs, seed, Aggregation.token_mean)
    metrics = train_on(engine, mini_batches, steps, loss_fn, not_finite)

    Each step has this rank's rows of one mini-batch, weighted by the counts of the whole
    mini-batch.
    """

    def __init__(
        self, sequences: Sequences, labels: Tensor | None, layout: Layout, device: str
    ) -> None:
        """`labels`: int64 [rows of the batch], number of each row's mini-batch; None: all rows form
        one. Collective."""
        self.sequences = sequences
        if labels is None:
            labels = torch.zeros(len(sequences.segment_counts), dtype=torch.int64)
        self.labels = sequences.of_segments(labels)
        """Those of each row of `sequences`."""
        self.counts = self._global_counts(layout, device)
        self.current = 0
        """The mini-batch of the step that was drawn last."""

    @property
    def num_labels(self) -> int:
        """Mini-batches of the whole batch."""
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        """Rows with a scored token, of all mini-batches and ranks."""
        return sum(rollout.num_rows + text.num_rows for rollout, text in self.counts)

    def add_columns(self, **per_token: Tensor) -> None:
        """Adds columns [scored tokens] for the loss; the counts stay as they are."""
        self.sequences = self.sequences.with_columns(per_token=per_token)

    def _global_counts(self, layout: Layout, device: str) -> list[tuple[Counts, Counts]]:
        """Counts of every mini-batch over all data ranks: (rows of the dataflow, rows of
        pretraining text).

        Ranks of one data coordinate hold the same rows, hence the division.
        """
        sequences = self.sequences
        largest = torch.tensor([int(self.labels.max()) if len(self.labels) else 0], device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        lengths, counted = sequences.batch_scored_lengths, sequences.segment_counts
        first = torch.cumsum(counted, 0) - counted
        is_text = sequences.per_row.get(
            PRETRAIN.name, torch.zeros(sequences.num_rows, dtype=torch.bool)
        )
        table = torch.zeros(int(largest) + 1, 2, 2, dtype=torch.int64)
        index = (self.labels[first], is_text[first].long())
        table[:, :, 0].index_put_(index, lengths, accumulate=True)
        table[:, :, 1].index_put_(index, (lengths > 0).long(), accumulate=True)
        table = table.to(device)
        dist.all_reduce(table)
        copies = layout.axis_size("pp") * layout.axis_size("cp") * layout.axis_size("tp")
        counts = []
        for rollout, text in (table // copies).tolist():
            counts.append(
                (
                    Counts(num_tokens=rollout[0], num_rows=rollout[1]),
                    Counts(num_tokens=text[0], num_rows=text[1]),
                )
            )
        return counts

    def steps(
        self, num_epochs: int, seed: int, aggregation: Aggregation, constant: int = 0
    ) -> Iterator[Sequences]:
        """The rows of every step with the weights of their tokens."""
        for label, rows in self._rows(num_epochs, seed):
            rollout, text = self.counts[label]
            lengths = rows.batch_scored_lengths
            columns = weight_columns(lengths, rollout, aggregation, constant=constant)
            if PRETRAIN.name in rows.per_row:
                text_columns = weight_columns(lengths, text, Aggregation.token_mean)
                is_text = torch.repeat_interleave(rows.per_row[PRETRAIN.name], rows.scored_lengths)
                for name, weights in columns.items():
                    columns[name] = torch.where(is_text, text_columns[name], weights)
            yield rows.with_columns(per_token=columns)

    def pair_steps(self, num_epochs: int, seed: int) -> Iterator[Sequences]:
        """The rows of every step with the weights of their pairs: 1 / pairs of the mini-batch."""
        for label, rows in self._rows(num_epochs, seed):
            rollout, _ = self.counts[label]
            weight = 2 / max(rollout.num_rows, 1)
            yield rows.with_columns(per_row={"weights": torch.full((rows.num_rows,), weight)})

    def _rows(self, num_epochs: int, seed: int) -> Iterator[tuple[int, Sequences]]:
        """(mini-batch, its rows of this rank): the first epoch in order, later ones in an order
        drawn from `seed`."""
        for epoch in range(num_epochs):
            order = np.arange(self.num_labels)
            if epoch:
                order = np.random.default_rng([seed, epoch]).permutation(self.num_labels)
            for label in order.tolist():
                self.current = label
                yield label, self.sequences.rows(torch.nonzero(self.labels == label).squeeze(1))


def train_on(
    engine: TrainingEngine,
    mini_batches: MiniBatches,
    steps: Iterable[Sequences],
    loss_fn: LossFn,
    not_finite: NotFinite,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
) -> list[dict[str, float]]:
    """Takes one optimizer step for each of `steps`, which are steps of `mini_batches`, and returns
    the metrics of each. Steps whose gradient is not finite are left out, or end the update, as
    `not_finite` says."""
    metrics: list[dict[str, float]] = []
    if not_finite.rewinds:
        return metrics
    for rows in steps:
        try:
            numbers = engine.train_step(rows, loss_fn, entropy=entropy, temperature=temperature)
            not_finite.succeeded()
        except NotFiniteError as error:
            numbers = not_finite.left_out(error, mini_batches.current)
        metrics.append(numbers)
        if not_finite.rewinds:
            break
    return metrics


def of_no_tokens(name: str) -> float | None:
    """A maximum or minimum over nothing; None for the name of another metric."""
    return {"_max": -math.inf, "_min": math.inf}.get(name[-4:])


def mean_over_steps(steps: Sequence[Mapping[str, float]], prefix: str) -> Metrics:
    """Each metric's mean over the optimizer steps, under the role's name.

    The maximum over all steps is taken of a metric ending in _max, the minimum of one ending in
    _min; of steps without tokens they are infinite (losses/reduction.py) and left out. Steps that were left
    out have the metrics `not_finite/...` alone, which are added up.
    """
    combined: dict[str, float] = {}
    names: dict[str, None] = {}
    for step in steps:
        names |= dict.fromkeys(step)
    for name in names:
        values = [step[name] for step in steps if name in step]
        values = [value for value in values if value != of_no_tokens(name)]
        if not values:
            continue
        if name.startswith(NOT_FINITE):
            combined[name] = sum(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_min"):
            combined[name] = min(values)
        else:
            combined[name] = sum(values) / len(values)
    combined |= derived_metrics(combined)
    return Metrics(prefixed(prefix, combined))
