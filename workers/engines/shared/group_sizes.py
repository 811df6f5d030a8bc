"""How many ranks of a row group share each micro-batch, by the lengths of its rows
(FlexSP, arXiv 2412.01523; ByteScale, arXiv 2502.21231).

A row that fits into one rank's budget needs no exchange; one of 8 times the budget needs 8 ranks.
The ranks of a row group are divided into aligned groups of each size: of 4 ranks {0 1 2 3}, {0 1}
{2 3}, {0} {1} {2} {3}. Each rank runs its micro-batches from the largest size down to 1. Whoever
shares a micro-batch has then shared all before it too, so that all of its ranks meet at the same
place of their lists: collectives over all ranks (FSDP's, layer by layer in every micro-batch) and
exchanges within a group come in the same order on every rank, and nothing can wait in a circle.

Only counts tokens, the same on every rank; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NEAR_PARTS = 4
"""Rows with one prompt are assigned one by one where together they are more than this part of a
group's work."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A micro-batch and the ranks that share it."""

    rows: np.ndarray
    """int64: the rows, by their numbers."""
    size: int
    """Ranks that share it."""
    place: int
    """Which of the aligned groups of that size has it."""


def nested_sizes(num_ranks: int) -> list[int]:
    """Sizes of groups from `num_ranks` to 1, each dividing the one before: 8, 4, 2, 1."""
    sizes = [num_ranks]
    while sizes[-1] > 1:
        smallest = next(prime for prime in range(2, sizes[-1] + 1) if sizes[-1] % prime == 0)
        sizes.append(sizes[-1] // smallest)
    return sizes


def assign_groups(
    widths: np.ndarray,
    units: list[np.ndarray],
    near: np.ndarray,
    budget_tokens: int,
    num_ranks: int,
    cut: Callable[[np.ndarray, int], list[np.ndarray]],
    quadratic: float,
) -> list[Assignment]:
    """All rows in micro-batches, from the largest groups to the smallest.

    widths: int64 [rows], tokens of each row. units: rows that must stay together. A unit is shared
    by the fewest ranks that have it within `budget_tokens` each (all of them where none do). The
    units of one size go to the group with the least work, the costliest first; those whose first
    rows have one label of `near` go together unless they are much of a group's work. cut(rows,
    tokens): a group's rows in micro-batches of so many tokens. quadratic: seconds of attention for a
    pair of tokens over those of a token for everything else.
    """
    sizes = nested_sizes(num_ranks)
    cost = widths * (1.0 + quadratic * widths)
    by_size: dict[int, dict[int, list[np.ndarray]]] = {size: {} for size in sizes}
    totals = dict.fromkeys(sizes, 0.0)
    for unit in units:
        size = num_ranks
        for smaller in sizes:
            if widths[unit].sum() <= smaller * budget_tokens:
                size = smaller
        by_size[size].setdefault(int(near[unit[0]]), []).append(unit)
        totals[size] += float(cost[unit].sum())
    load = np.zeros(num_ranks)
    assignments = []
    for size, by_label in by_size.items():
        num_groups = num_ranks // size
        most = totals[size] / (NEAR_PARTS * num_groups)
        items: list[np.ndarray] = []
        for alike in by_label.values():
            together = np.concatenate(alike)
            items += [together] if cost[together].sum() <= most else alike
        items.sort(key=lambda rows: -float(cost[rows].sum()))
        chosen: list[list[np.ndarray]] = [[] for _ in range(num_groups)]
        for rows in items:
            # Ranks of one group have run the same before, so any of them tells its load.
            place = int(np.argmin(load[::size]))
            load[place * size : (place + 1) * size] += cost[rows].sum() / size
            chosen[place].append(rows)
        for place, parts in enumerate(chosen):
            if parts:
                for rows in cut(np.sort(np.concatenate(parts)), size * budget_tokens):
                    assignments.append(Assignment(rows, size, place))
    return assignments


def imbalance(assignments: list[Assignment], widths: np.ndarray, quadratic: float) -> float:
    """The work of the busiest rank over the mean of all ranks."""
    num_ranks = max(assignment.size * (assignment.place + 1) for assignment in assignments)
    cost = widths * (1.0 + quadratic * widths)
    load = np.zeros(num_ranks)
    for assignment in assignments:
        first = assignment.place * assignment.size
        load[first : first + assignment.size] += cost[assignment.rows].sum() / assignment.size
    return float(load.max() / load.mean())
