"""RowLoader: batches of a dataset's rows, epoch after epoch, from an exactly known position.

The order of an epoch depends on (seed, epoch) only; of sources with weights, mixture.py says what
an epoch is. Rows form one endless stream, epoch 0, then
epoch 1, ...; a batch is the next batch_size of it, so no row is lost or repeated at the end of an
epoch. Leaves out prefetching: rows are already tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from controllers.data.config import DataConfig
from controllers.data.mixture import Mixture, random_keys
from controllers.data.rows import RowDataset
from hybridflow.batch import Batch


class RowLoader:
    """loader = RowLoader(dataset, config); batch = next(loader); state = loader.state_dict()"""

    def __init__(self, dataset: RowDataset, config: DataConfig) -> None:
        self.dataset, self.config = dataset, config
        self.position = 0
        """Rows given out so far, over all epochs."""
        self._mixture: Mixture | None = None
        if dataset.shares:
            self._mixture = Mixture(dataset.shares, shuffle=config.shuffle, seed=config.seed)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far."""
        return self.position / len(self.dataset)

    def __iter__(self) -> RowLoader:
        return self

    def __next__(self) -> Batch:
        return self.take(self.config.batch_size)

    def take(self, num_rows: int) -> Batch:
        """The next rows of the stream, as many as asked for."""
        first, self.position = self.position, self.position + num_rows
        return self.rows_at(range(first, self.position))

    def rows_at(self, places: Sequence[int]) -> Batch:
        """The rows at these places of the stream, wherever it stands."""
        epochs, places_in_epoch = np.divmod(np.asarray(places, np.int64), len(self.dataset))
        rows, uids = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            there = epochs == epoch
            ordered, numbers = self._epoch_of(epoch)
            rows[there] = ordered[places_in_epoch[there]]
            uids[there] = numbers[places_in_epoch[there]]
        return self.dataset.rows(rows, uids)

    def end_step(self) -> None:
        """The step that took rows has ended; a loader has nothing to do with that."""

    def order(self, epoch: int) -> np.ndarray:
        """int64 [rows]: the dataset's rows in the order of this epoch."""
        return self._epoch_of(epoch)[0]

    def _epoch_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in order, and the numbers of their uses (uid)."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, *self._make_epoch(epoch)
        return self._epoch[1], self._epoch[2]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows = len(self.dataset)
        if self._mixture is not None:
            return self._mixture.epoch(epoch)
        rows = np.arange(num_rows, dtype=np.int64)
        if self.config.shuffle:
            keys = random_keys((self.config.seed, epoch), num_rows)
            rows = np.argsort(keys, kind="stable").astype(np.int64)
        return rows, rows + epoch * num_rows

    @property
    def weights(self) -> list[float | None]:
        """The sources' weights, which the stream depends on."""
        return [share.weight for share in self.dataset.shares]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data: where the stream stands, and what it depends on."""
        return {
            "position": self.position,
            "num_rows": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
            "shuffle": self.config.shuffle,
            "seed": self.config.seed,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; batch_size may be another one, everything else must be the same."""
        ahead = state.get("ahead", {"waiting": [], "next_number": state["position"]})
        if ahead["waiting"] != list(range(state["position"], ahead["next_number"])):
            raise ValueError(
                "resume: the checkpoint was written with asynchrony.staleness > 0, and rows behind "
                "some that wait were trained on; set asynchrony.staleness as it was, or rows would "
                "be repeated"
            )
        if state["fingerprint"] != self.dataset.fingerprint:
            raise ValueError(
                f"resume: the checkpoint's data had {state['num_rows']} rows and fingerprint "
                f"{state['fingerprint'][:12]}, this one has {len(self.dataset)} and "
                f"{self.dataset.fingerprint[:12]}, so its position {state['position']} means "
                "nothing here; give the same data.train, columns, length limits and tokenizer, or "
                "start anew in another output_dir"
            )
        for name, value in (("shuffle", self.config.shuffle), ("seed", self.config.seed)):
            if state[name] != value:
                raise ValueError(
                    f"resume: data.{name} is {value}, the checkpoint was written with "
                    f"{state[name]}; rows would be lost or repeated. Set data.{name}={state[name]}"
                )
        if state.get("weights", []) != self.weights:
            raise ValueError(
                f"resume: the sources of data.train have the weights {self.weights}, the "
                f"checkpoint was written with {state.get('weights', [])}; rows would be lost or "
                "repeated. Set the same weights"
            )
        self.position = int(state["position"])
