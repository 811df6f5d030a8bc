"""TrainedWorker: the base of every role that is trained (policy, actor, critic, preference model).

It counts updates and saves the count with the checkpoint, because the order of the mini-batches in
an update's later epochs depends on it. The losses are left to the roles.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from hybridflow.seeds import combine_seed
from workers.engines.base import Head, LossFn
from workers.mini_batches import MiniBatches, mean_over_steps, train_on
from workers.model_worker import ModelWorker
from workers.roles import TrainedRole
from workers.sequences import Sequences
from workers.text import end_token_ids, save_endings
from workers.tokenizer import load_tokenizer

COUNTERS = "counters.json"


class TrainedWorker(ModelWorker, TrainedRole):
    """A role's update is three lines:

    mini_batches = self.mini_batches(batch, sequences_of(batch, ("returns",)))
    steps = mini_batches.steps(num_epochs, self.update_seed, Aggregation.token_mean)
    return self.update(mini_batches, steps, loss_fn)
    """

    prefix: ClassVar[str]
    """Prefix of the role's metrics."""

    def __init__(self, config: Any, context: RankContext) -> None:
        super().__init__(config, context)
        self.num_updates = 0
        """Updates so far, over all runs that the checkpoint comes from."""

    @property
    def update_seed(self) -> int:
        """Decides the order of this update's mini-batches from the second pass over the batch
        on."""
        return combine_seed(self.config.seed, self.num_updates)

    def mini_batches(self, batch: Batch, sequences: Sequences) -> MiniBatches:
        """The mini-batches of `sequences`, the rows of `batch`: by its column mini_batch, or a
        single one. Collective."""
        labels = batch.tensor("mini_batch") if "mini_batch" in batch else None
        return MiniBatches(sequences, labels, self.layout, self.context.device)

    def update(
        self,
        mini_batches: MiniBatches,
        steps: Iterable[Sequences],
        loss_fn: LossFn,
        temperature: float = 1.0,
    ) -> Metrics:
        """Takes one optimizer step for each of `steps`, which are steps of `mini_batches`."""
        metrics = train_on(self.engine, steps, loss_fn, temperature=temperature)
        self.num_updates += 1
        return mean_over_steps(metrics, self.prefix)

    def counters(self) -> dict[str, int]:
        """The numbers that training goes on from, besides the engine's state."""
        return {"num_updates": self.num_updates}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.num_updates = counters["num_updates"]

    def save_checkpoint(self, directory: str) -> None:
        self.engine.save(Path(directory))
        if self.context.rank == 0:
            (Path(directory) / COUNTERS).write_text(json.dumps(self.counters()))

    def load_checkpoint(self, directory: str) -> None:
        """Raises a ValueError where the checkpoint has no counters."""
        path = Path(directory) / COUNTERS
        if not path.exists():
            raise ValueError(
                f"{directory} has no {COUNTERS}, so it was written by an earlier version and "
                "cannot be resumed; start a new run from its weights"
            )
        self.engine.load(Path(directory))
        self.load_counters(json.loads(path.read_text()))

    def save_pretrained(self, directory: str) -> None:
        """Writes weights, tokenizer, chat template and the tokens that end a response as a
        Hugging Face directory."""
        self.engine.save_pretrained(Path(directory))
        self._save_tokenizer(directory)

    def try_saving(self, directory: str) -> int:
        try:
            num_bytes = self.engine.try_saving(Path(directory))
            self._save_tokenizer(directory)
        except Exception as error:  # of transformers' writers or the model's own code
            raise ValueError(
                f"{self.prefix}: a model like {self.model.path!r} can't be saved to {directory}: "
                f"{type(error).__name__}: {error}; correct that file of the model, or choose another "
                "output_dir"
            ) from error
        return num_bytes

    def _save_tokenizer(self, directory: str) -> None:
        if self.context.rank == 0:
            tokenizer = load_tokenizer(self.model)
            tokenizer.save_pretrained(directory)
            if self.head is Head.lm:
                save_endings(Path(directory), end_token_ids(self.model, tokenizer=tokenizer))

    def peak_memory_bytes(self) -> int:
        if self.context.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.context.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
