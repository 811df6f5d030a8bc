"""Random token data for the tests of the losses: float64, rows of given lengths, cut in any way."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.base import LossFn, Outputs
from workers.engines.shared.metrics import combine_metrics
from workers.losses.aggregation import Aggregation, count, weight_columns
from workers.losses.preference import pair_columns
from workers.sequences import Sequences, ragged_positions


def make_sequences(
    lengths: list[int],
    seed: int = 0,
    aggregation: Aggregation = Aggregation.token_mean,
    mask: Tensor | None = None,
) -> Sequences:
    """Rows of 2 prompt tokens and `lengths` scored tokens with every column that a loss reads."""
    generator = torch.Generator().manual_seed(seed)
    scored = torch.tensor(lengths, dtype=torch.int64)
    num_tokens = int(scored.sum())
    base = -torch.rand(num_tokens, generator=generator, dtype=torch.float64) * 3 - 0.1

    def near(scale: float) -> Tensor:
        return base + scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    columns = {
        "advantages": torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        "old_log_probs": near(0.2),
        "ref_log_probs": near(0.5),
        "rollout_log_probs": near(0.5),
        "teacher_log_probs": near(0.5),
        "returns": torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        "values": torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        "covariance_selected": torch.rand(num_tokens, generator=generator) < 0.3,
        "current": near(0.2),
        **weights_of(scored, aggregation, mask),
    }
    return Sequences(
        token_ids=torch.zeros(int((scored + 2).sum()), dtype=torch.int64),
        lengths=scored + 2,
        scored_lengths=scored,
        per_token=columns,
    )


def weights_of(lengths: Tensor, aggregation: Aggregation, mask: Tensor | None) -> dict[str, Tensor]:
    """The weights of the tokens in `mask`; the others weigh 0, which is how losses know that they
    do not count."""
    if mask is None:
        return weight_columns(lengths, count(lengths), aggregation, constant=7)
    kept = torch.tensor([int(row.sum()) for row in mask.split(lengths.tolist())])
    columns = {}
    for name, values in weight_columns(kept, count(kept), aggregation, constant=7).items():
        columns[name] = torch.zeros(len(mask))
        columns[name][mask] = values
    return columns


def make_pairs(lengths: list[int], seed: int = 0) -> Sequences:
    """Rows in the order chosen, rejected, ..., an even number of lengths."""
    sequences = make_sequences(lengths, seed)
    num_rows = len(lengths)
    harm = torch.where(
        torch.rand(num_rows, generator=torch.Generator().manual_seed(seed)) < 0.5, 1.0, -1.0
    )
    return sequences.with_columns(
        per_row={**pair_columns(num_rows // 2), "harm_sign": harm, "rank": torch.arange(num_rows)}
    )


def run_whole(
    loss_fn: LossFn, sequences: Sequences
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    return run_parts(loss_fn, sequences, [list(range(sequences.num_rows))])


def run_parts(
    loss_fn: LossFn, sequences: Sequences, parts: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """(loss, metrics, gradients of log_probs, entropy, values, scores) of rows cut into
    micro-batches and reduced as an engine does it."""
    log_probs = sequences.per_token["current"].clone().requires_grad_()
    entropy = (log_probs.detach().abs() + 0.5).requires_grad_()
    values = (sequences.per_token["returns"] * 0.7 + 0.2).clone().requires_grad_()
    scores = torch.linspace(-1, 2, sequences.num_rows, dtype=torch.float64).roll(1).requires_grad_()
    leaves = [log_probs, entropy, values, scores]
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for part in parts:
        rows = torch.tensor(part, dtype=torch.int64)
        index = ragged_positions(sequences.scored_lengths, rows)
        outputs = Outputs(
            log_probs=log_probs[index],
            entropy=entropy[index],
            values=values[index],
            scores=scores[rows],
        )
        loss, part_metrics = loss_fn(outputs, sequences.rows(rows))
        assert loss.shape == () and loss.requires_grad
        assert not metrics or metrics.keys() == part_metrics.keys(), (
            "metric names must not depend on the micro-batch"
        )
        for name, value in part_metrics.items():
            assert value.shape == () and not value.requires_grad, name
        metrics = combine_metrics(metrics, part_metrics)
        losses.append(loss)
    total = torch.stack(losses).sum()
    total.backward()
    return (
        total.detach(),
        metrics,
        [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves],
    )
