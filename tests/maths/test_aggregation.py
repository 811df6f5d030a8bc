"""Token weights against the definitions of the aggregations."""

from __future__ import annotations

import pytest
import torch

from workers.losses.aggregation import Aggregation, Counts, count, weight_columns

LENGTHS = [2, 0, 1, 3]
LOSSES = [[1.0, 2.0], [], [4.0], [8.0, 16.0, 32.0]]


def naive(rows: list[list[float]], aggregation: Aggregation, constant: int) -> float:
    rows = [row for row in rows if row]
    match aggregation:
        case Aggregation.token_mean:
            return sum(map(sum, rows)) / sum(map(len, rows))
        case Aggregation.seq_mean_token_sum:
            return sum(map(sum, rows)) / len(rows)
        case Aggregation.seq_mean_token_mean:
            return sum(sum(row) / len(row) for row in rows) / len(rows)
        case Aggregation.constant:
            return sum(map(sum, rows)) / (len(rows) * constant)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_weights_give_the_aggregate(aggregation: Aggregation):
    lengths = torch.tensor(LENGTHS)
    losses = torch.tensor([x for row in LOSSES for x in row])
    columns = weight_columns(lengths, count(lengths), aggregation, constant=10)
    assert (columns["weights"] * losses).sum().item() == pytest.approx(
        naive(LOSSES, aggregation, 10)
    )
    assert (columns["mean_weights"] * losses).sum().item() == pytest.approx(
        naive(LOSSES, Aggregation.token_mean, 10)
    )
    assert columns["weights"].dtype == columns["mean_weights"].dtype == torch.float32


def test_counts_of_parts_add_up():
    parts = count(torch.tensor([2, 0])) + count(torch.tensor([1, 3]))
    assert parts == count(torch.tensor(LENGTHS)) == Counts(num_tokens=6, num_rows=3)


def test_parts_weighted_with_global_counts_are_the_whole():
    counts = count(torch.tensor(LENGTHS))
    for aggregation in Aggregation:
        whole = weight_columns(torch.tensor(LENGTHS), counts, aggregation, constant=5)["weights"]
        parts = [
            weight_columns(torch.tensor(part), counts, aggregation, constant=5)["weights"]
            for part in ([2, 0], [1], [3])
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_a_constant_is_asked_for():
    with pytest.raises(ValueError, match="longest response"):
        weight_columns(torch.tensor([1]), Counts(num_tokens=1, num_rows=1), Aggregation.constant)


def test_nothing_scored():
    empty = torch.tensor([0, 0])
    assert weight_columns(empty, count(empty), Aggregation.token_mean)["weights"].shape == (0,)
