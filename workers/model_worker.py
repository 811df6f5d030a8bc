"""ModelWorker: the base of every role over a training engine, frozen or trained, and batches as
token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.worker import Worker
from workers.columns import IMAGES, LOSS_MASK, SEGMENT_LENGTHS
from workers.config import ModelConfig, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.engines.model.loading import model_config
from workers.layouts import training_layout
from workers.losses.segments import row_of_token, segment_sum
from workers.pool_memory import pool_memory
from workers.precision import with_native_precision
from workers.process_memory import give_back
from workers.sequences import Sequences


class ModelWorker(Worker):
    """A role over one training engine, which its __init__ builds:

    self.build(self.config.model, self.config.train, Head.lm, context, trains=False)
    """

    engine: TrainingEngine
    model: ModelConfig
    head: Head
    layout: Layout

    def __init__(self, config: Any, context: RankContext) -> None:
        """`config`: self.config has it with precisions decided."""
        super().__init__(with_native_precision(config, context.device), context)
        self.pool_memory = pool_memory(context.pool)

    @classmethod
    def layouts(cls, config: Any, world_size: int) -> dict[str, Layout]:
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
        """Builds the engine; `seed` draws a new head, `trains=False` leaves out the optimizer. The
        base of an adapter that another role of the pool has too is in memory once. Collective."""
        torch.manual_seed(seed)
        self.model, self.head = model, head
        lenders: dict[str, TrainingEngine] = {}
        for engine in self.pool_memory.engines:
            if engine.lends_base(model, train):
                lenders = {"lender": engine}
        self.engine = engine_class(train.engine)(
            model=model,
            config=train,
            head=head,
            context=context,
            trains=trains,
            seed=seed,
            **lenders,
        )
        self.layout = self.engine.layout
        # Whole weights left gaps between a rank's parts, too small for what comes.
        give_back(context.device, 0)
        self.pool_memory.engines.add(self.engine)

    def share_base(self, model: ModelConfig, train: TrainConfig) -> bool:
        """Takes the engine of another role of the pool whose adapter is on this model, where there
        is one: the model is then in memory once. Forward passes belong in its `base_only`."""
        for engine in self.pool_memory.engines:
            if engine.has_base(model, train):
                self.model, self.head, self.engine = model, Head.lm, engine
                self.layout = engine.layout
                return True
        return False

    def to_training(self) -> None:
        """Called before the training engine is used, for a forward pass too: generation in the
        same pool gives up its memory, with release_during_training."""
        self.pool_memory.for_training()

    def to_score(self, sequences: Sequences) -> Sequences:
        """The rows as a sequence-classification model reads them: up to the last token that is not
        padding, which is where transformers reads the score. A response that ends in an end token
        that pads too is scored at the token before."""
        config = model_config(self.model, self.head).get_text_config()
        return sequences.without_trailing(config.pad_token_id)

    def scored(self, batch: Batch, values: Tensor | None, name: str) -> Batch:
        """The column `name` of one float per scored token; empty on ranks whose result is not
        collected."""
        if values is None:
            return Batch.of(**{name: Ragged(torch.empty(0), torch.zeros(0, dtype=torch.int64))})
        return Batch.of(**{name: Ragged(values.cpu(), num_scored(batch))})


def sequences_of(batch: Batch, per_token: Sequence[str] = ()) -> Sequences:
    """prompt_ids + response_ids row by row, the response scored, or what loss_mask has of it; each
    segment of a row is one of its own. `per_token` columns that the batch has go along."""
    prompts, responses = batch.ragged("prompt_ids"), batch.ragged("response_ids")
    scored = None
    if LOSS_MASK.name in batch:
        mask = batch.ragged(LOSS_MASK.name)
        none = Ragged(torch.zeros(len(prompts.values), dtype=torch.bool), prompts.lengths)
        scored = interleave(none, mask)
    num_tokens = num_scored(batch)
    columns = {name: batch.ragged(name).values for name in per_token if name in batch}
    for name, values in columns.items():
        assert len(values) == int(num_tokens.sum()), f"{name} is not over the scored tokens"
    lengths, batch_row = prompts.lengths + responses.lengths, None
    images = None
    if IMAGES.name in batch:
        images = list(map(tuple, batch.objects(IMAGES.name)))
    if SEGMENT_LENGTHS.name in batch:
        segments = batch.ragged(SEGMENT_LENGTHS.name)
        if len(segments.values) > len(batch):
            assert scored is not None, "rows with segments have a loss_mask"
            assert images is None, "episodes have no images"
            lengths, batch_row = segments.values, row_of_token(segments.lengths)
            num_tokens = segment_sum(scored.long(), row_of_token(lengths), len(lengths))
    return Sequences(
        token_ids=interleave(prompts, responses),
        lengths=lengths,
        scored_lengths=num_tokens,
        scored=scored,
        images=images,
        batch_row=batch_row,
        per_token=columns,
    )


def with_routes(sequences: Sequences, routes: Ragged) -> Sequences:
    """The same rows, whose tokens go to the experts that the column `routes` says: it has none for
    the last token of a row."""
    assert torch.equal(routes.lengths, sequences.lengths - 1), "routes of other rows"
    last = torch.cumsum(sequences.lengths, 0) - 1
    has_route = torch.ones(len(sequences.token_ids), dtype=torch.bool)
    has_route[last] = False
    every = routes.values.new_full((len(has_route), *routes.values.shape[1:]), -1)
    every[has_route] = routes.values
    return replace(sequences, routes=every)


def num_scored(batch: Batch) -> Tensor:
    """int64 [rows]: response tokens that are scored."""
    if LOSS_MASK.name not in batch:
        return batch.ragged("response_ids").lengths
    mask = batch.ragged(LOSS_MASK.name)
    return segment_sum(mask.values.long(), row_of_token(mask.lengths), len(batch))


def pairs_of(batch: Batch, per_token: Sequence[str] = ()) -> Sequences:
    """The sequences of preference pairs: with the per-row columns that losses on pairs read."""
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
