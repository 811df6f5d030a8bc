"""ModelWorker: what the roles that hold a model have in common: layout, engine, checkpoints, and batches as
token sequences."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.worker import Worker
from workers.config import ModelConfig, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.layouts import training_layout
from workers.sequences import Sequences


class ModelWorker(Worker):
    """A role over one training engine."""

    engine: TrainingEngine
    model: ModelConfig

    @classmethod
    def layouts(cls, config, world_size: int) -> dict[str, Layout]:  # type: ignore[no-untyped-def]
        return {"train": training_layout(config.train, world_size, cls.__name__)}

    def build(
        self,
        model: ModelConfig,
        train: TrainConfig,
        head: Head,
        context: RankContext,
        *,
        seed: int = 0,
        trains: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        self.model = model
        self.engine = engine_class(train.engine)(
            model=model, config=train, head=head, context=context, trains=trains
        )
        self.layout = self.engine.layout

    def save_checkpoint(self, directory: str) -> None:
        self.engine.save(Path(directory))

    def load_checkpoint(self, directory: str) -> None:
        self.engine.load(Path(directory))

    def save_pretrained(self, directory: str) -> None:
        """Weights and tokenizer."""
        self.engine.save_pretrained(Path(directory))
        if self.context.rank == 0:
            model = self.model
            name = model.tokenizer or model.path
            AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code).save_pretrained(
                directory
            )

    def peak_memory_bytes(self) -> int:
        if self.context.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.context.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def scored(self, batch: Batch, values: Tensor | None, name: str) -> Batch:
        """The column `name` of one float per response token; empty on ranks whose result is not collected."""
        if values is None:
            return Batch.of(**{name: Ragged(torch.empty(0), torch.zeros(0, dtype=torch.int64))})
        return Batch.of(**{name: Ragged(values.cpu(), batch.ragged("response_ids").lengths)})


def sequences_of(batch: Batch, per_token: Sequence[str] = ()) -> Sequences:
    """prompt_ids + response_ids row by row, the response scored; `per_token` columns that the batch has go
    along."""
    prompts, responses = batch.ragged("prompt_ids"), batch.ragged("response_ids")
    return Sequences(
        token_ids=interleave(prompts, responses),
        lengths=prompts.lengths + responses.lengths,
        scored_lengths=responses.lengths,
        per_token={name: batch.ragged(name).values for name in per_token if name in batch},
    )


def pairs_of(batch: Batch, per_token: Sequence[str] = ()) -> Sequences:
    """The same for preference pairs: with the per-row columns that losses on pairs read."""
    return sequences_of(batch, per_token).with_columns(
        per_row={"pair": batch.tensor("pair"), "chosen": batch.tensor("chosen")}
    )


def interleave(first: Ragged, second: Ragged) -> Tensor:
    """[sum of all lengths]: row 0 of first, row 0 of second, row 1 of first, ..."""
    lengths = torch.stack([first.lengths, second.lengths], 1).reshape(-1)
    is_second = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 1, lengths)
    result = torch.empty(int(lengths.sum()), dtype=first.values.dtype)
    result[~is_second] = first.values
    result[is_second] = second.values
    return result
