"""Mixture: the order of an epoch of several sources with weights.

An epoch has as many rows as all sources together, and the same number from each source in every
epoch: its weight's share of them. A source whose share is larger than itself begins anew, a smaller
one goes on in the next epoch, so that over many epochs each of its rows is used equally often.
Where a row stands depends on (seed, epoch) only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from controllers.data.writer import Share


class Mixture:
    """rows, uids = Mixture(shares, shuffle=True, seed=0).epoch(3)   # int64 [rows] each"""

    def __init__(self, shares: Sequence[Share], *, shuffle: bool, seed: int) -> None:
        self.shuffle, self.seed = shuffle, seed
        self.sizes = np.array([share.num_rows for share in shares], dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.num_rows = int(self.sizes.sum())
        weights = np.ones(len(shares))
        for number, share in enumerate(shares):
            if share.weight is not None:
                weights[number] = share.weight
        self.counts = allocate(self.num_rows, weights)
        """Rows of each source in an epoch."""

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The dataset's rows in the order of this epoch, and the number of each use: row +
        (passes over its source so far) * rows of the dataset."""
        source = self._sources(epoch)
        rows = np.empty(self.num_rows, dtype=np.int64)
        passes = np.empty(self.num_rows, dtype=np.int64)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            use = epoch * count + np.arange(count)
            own_rows = np.empty(count, dtype=np.int64)
            for pass_ in np.unique(use // size):
                taken = use // size == pass_
                own_rows[taken] = self._order(number, int(pass_))[use[taken] % size]
            places = source == number
            rows[places] = self.starts[number] + own_rows
            passes[places] = use // size
        return rows, rows + passes * self.num_rows

    def _sources(self, epoch: int) -> np.ndarray:
        """The source of each row of an epoch: spread evenly, or shuffled."""
        positions = [(np.arange(count) + 0.5) / max(count, 1) for count in self.counts]
        labels = np.repeat(np.arange(len(self.counts)), self.counts)
        if self.shuffle:
            keys = random_keys((self.seed, epoch, 0), self.num_rows)
            return np.asarray(labels[np.argsort(keys, kind="stable")])
        return np.asarray(labels[np.argsort(np.concatenate(positions), kind="stable")])

    def _order(self, number: int, pass_: int) -> np.ndarray:
        """The source's rows in the order of one pass over them."""
        size = int(self.sizes[number])
        if not self.shuffle:
            return np.arange(size)
        return np.argsort(random_keys((self.seed, pass_, number + 1), size), kind="stable")


def random_keys(key: tuple[int, ...], size: int) -> np.ndarray:
    """uint64 [size], a function of the key. A bit generator's raw stream, unlike
    Generator.permutation, is the same in every numpy version."""
    if len(key) == 2:
        return np.asarray(np.random.Philox(key=np.array(key, np.uint64)).random_raw(size))
    counter = np.array([0, 0, 0, key[2]], dtype=np.uint64)
    generator = np.random.Philox(key=np.array(key[:2], np.uint64), counter=counter)
    return np.asarray(generator.random_raw(size))


def allocate(total: int, weights: np.ndarray) -> np.ndarray:
    """int64: whole numbers in the proportion of the weights that add up to `total` (largest
    remainders)."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
    counts[largest] += 1
    return np.asarray(counts)
