"""ModelWorker: what the roles that hold a model have in common: layout, engine, checkpoints, and batches as
token sequences."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.results import Metrics
from hybridflow.worker import Worker
from workers.config import ModelConfig, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, LossFn, TrainingEngine
from workers.losses.aggregation import Aggregation, Counts, counted_lengths, weight_columns
from workers.losses.reduction import derived_metrics
from workers.sequences import Sequences

LOSS_MASK = "loss_mask"


def training_layout(config: TrainConfig, world_size: int, role: str) -> Layout:
    """dp is what pp and tp leave of the pool."""
    parallel = config.pp * config.tp
    if parallel < 1 or world_size % parallel:
        raise ValueError(
            f"{role}.train: pp={config.pp} x tp={config.tp} does not divide the pool's {world_size} devices; "
            "choose sizes whose product is one of "
            f"{[n for n in range(1, world_size + 1) if world_size % n == 0]}"
        )
    return Layout.of(order=tuple(config.rank_order), dp=world_size // parallel, pp=config.pp, tp=config.tp)


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


class MiniBatches:
    """The optimizer steps of one update: each mini-batch's rows of this rank with the weights of the whole
    mini-batch.

    Which rows form a mini-batch was decided for the whole batch (column mini_batch), so it does not depend on
    the layout.
    """

    def __init__(self, sequences: Sequences, labels: Tensor | None, layout: Layout, device: str) -> None:
        self.sequences = sequences
        self.labels = labels if labels is not None else torch.zeros(sequences.num_rows, dtype=torch.int64)
        self.is_text = sequences.per_row.get("pretrain", torch.zeros(sequences.num_rows, dtype=torch.bool))
        self.counts = self._global_counts(layout, device)

    @property
    def num_labels(self) -> int:
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        """Of all mini-batches and ranks that have a counted token."""
        return sum(counts.num_rows for kinds in self.counts for counts in kinds)

    def _global_counts(self, layout: Layout, device: str) -> list[list[Counts]]:
        """Of every mini-batch over all data ranks: of its rows of the dataflow, and of its rows of
        pretraining text. Ranks of one data coordinate hold the same rows, hence the division."""
        largest = torch.tensor([int(self.labels.max()) if len(self.labels) else 0], device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        lengths = counted_lengths(self.sequences.scored_lengths, self.sequences.per_token.get(LOSS_MASK))
        table = torch.zeros(int(largest) + 1, 2, 2, dtype=torch.int64)
        place = (self.labels, self.is_text.long())
        table[:, :, 0].index_put_(place, lengths, accumulate=True)
        table[:, :, 1].index_put_(place, (lengths > 0).long(), accumulate=True)
        table = table.to(device)
        dist.all_reduce(table)
        copies = layout.axis_size("pp") * layout.axis_size("cp") * layout.axis_size("tp")
        return [
            [Counts(num_tokens=tokens // copies, num_rows=rows // copies) for tokens, rows in kinds]
            for kinds in table.tolist()
        ]

    def steps(
        self, num_epochs: int, seed: int, aggregation: Aggregation, constant: int
    ) -> Iterator[tuple[int, Sequences]]:
        """(number of the step, rows with the weights of their tokens); tokens outside a column loss_mask do
        not count."""
        for number, (label, rows) in enumerate(self._rows(num_epochs, seed)):
            own, text = self.counts[label]
            mask = rows.per_token.get(LOSS_MASK)
            columns = weight_columns(rows.scored_lengths, own, aggregation, constant=constant, mask=mask)
            if "pretrain" in rows.per_row:
                of_text = weight_columns(rows.scored_lengths, text, Aggregation.token_mean)
                is_text = torch.repeat_interleave(rows.per_row["pretrain"], rows.scored_lengths)
                columns = {name: torch.where(is_text, of_text[name], columns[name]) for name in columns}
            yield number, rows.with_columns(per_token=columns)

    def pair_steps(self, num_epochs: int, seed: int) -> Iterator[tuple[int, Sequences]]:
        """(number of the step, rows with the weights of their pairs): 1 / pairs of the mini-batch."""
        for number, (label, rows) in enumerate(self._rows(num_epochs, seed)):
            weight = 2 / max(self.counts[label][0].num_rows, 1)
            yield number, rows.with_columns(per_row={"weights": torch.full((rows.num_rows,), weight)})

    def _rows(self, num_epochs: int, seed: int) -> Iterator[tuple[int, Sequences]]:
        """(mini-batch, its rows of this rank): the first epoch in order, later ones in an order drawn from
        `seed`."""
        for epoch in range(num_epochs):
            order = (
                np.random.default_rng([seed, epoch]).permutation(self.num_labels)
                if epoch
                else np.arange(self.num_labels)
            )
            for label in order:
                yield int(label), self.sequences.rows(torch.nonzero(self.labels == int(label)).squeeze(1))


def mean_over_steps(steps: Sequence[Mapping[str, float]], prefix: str) -> Metrics:
    """Each metric's mean over the optimizer steps (_max and _min: over all of them), under the role's
    name."""
    combined: dict[str, float] = {}
    for name in steps[0]:
        values = [step[name] for step in steps]
        reduce: Callable[[list[float]], float] = (
            max if name.endswith("_max") else min if name.endswith("_min") else _mean
        )
        combined[name] = reduce(values)
    combined |= derived_metrics(combined)
    return Metrics({f"{prefix}/{name}": value for name, value in combined.items()})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def train_on(
    engine: TrainingEngine,
    steps: Iterator[tuple[int, Sequences]],
    loss_fn: LossFn,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
) -> list[dict[str, float]]:
    """One optimizer step for each of `steps`."""
    return [engine.train_step(rows, loss_fn, entropy=entropy, temperature=temperature) for _, rows in steps]
