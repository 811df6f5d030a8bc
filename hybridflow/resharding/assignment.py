"""The assignment problem: a column for every row such that the sum of gains is largest (Kuhn
1955), solved by shortest augmenting paths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(gain: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of every row of a square matrix [n, n] such that the gains add up to the most:
    int64 [n].

    O(n^3): 512 x 512 takes a few seconds. A row first takes a column of its largest gain that no
    other row has, which is the whole answer in easy cases.
    """
    size = len(gain)
    cost = gain.max() - gain
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)
    column_of = np.full(size, -1)
    row_price[:] = cost.min(axis=1)
    for row in range(size):
        columns = np.nonzero((cost[row] - row_price[row] == 0) & (row_of < 0))[0]
        if len(columns):
            row_of[columns[0]], column_of[row] = row, columns[0]
    for row in np.nonzero(column_of < 0)[0]:
        _augment(int(row), cost, row_price, column_price, row_of, column_of)
    return column_of.astype(np.int64)


def _augment(
    row: int,
    cost: NDArray[np.float64],
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
    row_of: NDArray[np.int64],
    column_of: NDArray[np.int64],
) -> None:
    """Assigns `row` along the shortest path, in reduced costs, to a column that no row has
    (Dijkstra); the rows along the path change columns."""
    distance = np.full(len(cost), np.inf)
    before = np.full(len(cost), -1)
    done = np.zeros(len(cost), dtype=bool)
    current, reached = row, 0.0
    while True:
        through = reached + cost[current] - row_price[current] - column_price
        better = ~done & (through < distance)
        distance[better], before[better] = through[better], current
        column = int(np.where(done, np.inf, distance).argmin())
        reached = float(distance[column])
        done[column] = True
        if row_of[column] < 0:
            break
        current = int(row_of[column])
    # Prices stay feasible: reduced costs are >= 0, and 0 on the assignment.
    slack = reached - distance
    inner = done.copy()
    inner[column] = False
    row_price[row] += reached
    row_price[row_of[inner]] += slack[inner]
    column_price[inner] -= slack[inner]
    while True:
        from_row = int(before[column])
        row_of[column] = from_row
        column, column_of[from_row] = int(column_of[from_row]), column
        if from_row == row:
            return
