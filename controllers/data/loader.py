"""RowLoader: batches of a dataset's rows, epoch after epoch, from an exactly known position.

The order of an epoch depends on (seed, epoch) only. Rows form one endless stream, epoch 0, then
epoch 1, ...; a batch is the next batch_size of it, so no row is lost or repeated at the end of an
epoch. Leaves out prefetching: rows are already tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from controllers.data.config import DataConfig
from controllers.data.rows import RowDataset
from hybridflow.batch import Batch


class RowLoader:
    """loader = RowLoader(dataset, config); batch = next(loader); state = loader.state_dict()"""

    def __init__(self, dataset: RowDataset, config: DataConfig) -> None:
        self.dataset, self.config = dataset, config
        self.position = 0
        """Rows given out so far, over all epochs."""
        self._order: tuple[int, np.ndarray] | None = None

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
        rows, uids, taken = [], [], 0
        while taken < num_rows:
            epoch, start = divmod(self.position + taken, len(self.dataset))
            part = self.order(epoch)[start : start + num_rows - taken]
            rows.append(part)
            uids.append(part + epoch * len(self.dataset))
            taken += len(part)
        self.position += taken
        return self.dataset.rows(np.concatenate(rows), np.concatenate(uids))

    def order(self, epoch: int) -> np.ndarray:
        """int64 [rows]: the dataset's rows in the order of this epoch."""
        if not self.config.shuffle:
            return np.arange(len(self.dataset), dtype=np.int64)
        if self._order is None or self._order[0] != epoch:
            # A bit generator's raw stream, unlike Generator.permutation, is the same in every numpy
            # version.
            key = np.array([self.config.seed, epoch], dtype=np.uint64)
            keys = np.random.Philox(key=key).random_raw(len(self.dataset))
            self._order = epoch, np.argsort(keys, kind="stable").astype(np.int64)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data: where the stream stands, and what it depends on."""
        return {
            "position": self.position,
            "num_rows": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
            "shuffle": self.config.shuffle,
            "seed": self.config.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; batch_size may be another one, everything else must be the same."""
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
        self.position = int(state["position"])
