"""Sequences: the input of a training engine, token sequences without padding and the columns that
go with them.

One row is prompt + response. The *scored* tokens of a row are those that the policy wrote or has to
learn: its last `scored_lengths[i]` tokens (the response in RLHF, everything but the first token in
language modelling), or those in `scored`, where an environment wrote some tokens in between.
Everything per token is flat over scored tokens: those of row 0, then of row 1, and so on. So no
loss, advantage or metric ever meets a token of an environment. A row of the batch whose history was
rewritten is several rows here, its segments (`batch_row`), which do not see one another. How rows
are cut into micro-batches is the engine's business and never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.images.reference import ImageReference


@dataclass(kw_only=True, slots=True)
class Sequences:
    """Rows [5, 6, 7 | 8, 9] (prompt | response) and [5 | 6]:

    Sequences(token_ids=tensor([5, 6, 7, 8, 9, 5, 6]), lengths=tensor([5, 2]), scored_lengths=tensor([2, 1]),
              per_token={"advantages": tensor([.1, .2, .3])}, per_row={"uid": tensor([0, 1])})
    """

    token_ids: Tensor
    """int64 [sum(lengths)], the rows one after the other."""
    lengths: Tensor
    """int64 [rows], tokens of each row, at least scored_lengths + 1 (the first token of a row
    has no prediction)."""
    scored_lengths: Tensor
    """int64 [rows], how many tokens of each row are scored; 0 is allowed."""
    scored: Tensor | None = None
    """bool [sum(lengths)], which tokens those are, never the first of a row; None: the last
    ones."""
    routes: Tensor | None = None
    """int16 [sum(lengths), layers, experts per token]: the experts of a mixture that each token is
    sent to, by layer with experts; -1 where the router decides."""
    images: list[tuple[ImageReference, ...]] | None = None
    """[rows]: the images of each row, in the order of their tokens; None: there are none."""
    batch_row: Tensor | None = None
    """int64 [rows], ascending: the row of the batch that each row is a segment of; None: each is
    one of its own."""
    per_token: dict[str, Tensor] = field(default_factory=dict)
    """name -> [sum(scored_lengths), ...], for the loss (advantages, old_log_probs, weights,
    ...)."""
    per_row: dict[str, Tensor] = field(default_factory=dict)
    """name -> [rows, ...]."""
    counted: Tensor | None = None
    """int64: the scored tokens whose column `weights` is not 0; None: not looked for yet. On a GPU
    the host would wait for the pass before, to know how many there are."""
    token_rows: Tensor | None = None
    """row_of_token, where it is known already."""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def segment_counts(self) -> Tensor:
        """int64 [rows of the batch]: the segments of each."""
        if self.batch_row is None:
            return torch.ones(self.num_rows, dtype=torch.int64, device=self.lengths.device)
        return torch.unique_consecutive(self.batch_row, return_counts=True)[1]

    @property
    def batch_scored_lengths(self) -> Tensor:
        """int64 [rows of the batch]: scored tokens of each, in all of its segments."""
        if self.batch_row is None:
            return self.scored_lengths
        counts = self.segment_counts
        number = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return torch.zeros_like(counts).index_add(0, number, self.scored_lengths)

    def of_segments(self, values: Tensor) -> Tensor:
        """[rows]: values [rows of the batch], for each of a row's segments."""
        return torch.repeat_interleave(values, self.segment_counts, dim=0)

    @property
    def num_scored_tokens(self) -> int:
        return int(self.scored_lengths.sum())

    @property
    def row_of_token(self) -> Tensor:
        """int64 [sum(scored_lengths)]: the row that every scored token belongs to."""
        if self.token_rows is not None:
            return self.token_rows
        return torch.repeat_interleave(
            torch.arange(self.num_rows, device=self.lengths.device), self.scored_lengths
        )

    @property
    def scored_columns(self) -> Tensor:
        """int64 [sum(scored_lengths)]: the place of every scored token in its row."""
        if self.scored is not None:
            starts = torch.cumsum(self.lengths, 0) - self.lengths
            return torch.nonzero(self.scored).squeeze(1) - starts[self.row_of_token]
        before = torch.cumsum(self.scored_lengths, 0) - self.scored_lengths
        first = self.lengths - self.scored_lengths
        flat = torch.arange(self.num_scored_tokens, device=self.lengths.device)
        return flat + torch.repeat_interleave(first - before, self.scored_lengths)

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 [rows]: tokens before the first scored one; all of them where none is."""
        if self.scored is None:
            return self.lengths - self.scored_lengths
        return self._of_scored(self.lengths, "amin")

    @property
    def read_lengths(self) -> Tensor:
        """int64 [rows]: tokens up to the last scored one, which is included; all of the row where
        the scored tokens are its last ones."""
        if self.scored is None:
            return self.lengths
        return self._of_scored(torch.zeros_like(self.lengths), "amax", shift=1)

    def _of_scored(self, otherwise: Tensor, reduce: str, shift: int = 0) -> Tensor:
        """The first or last place (plus `shift`) of each row's scored tokens."""
        columns = self.scored_columns + shift
        return otherwise.scatter_reduce(0, self.row_of_token, columns, reduce)

    def rows(self, index: Sequence[int] | Tensor) -> Sequences:
        """The given rows in the given order."""
        index = torch.as_tensor(index, dtype=torch.int64)
        tokens = ragged_positions(self.lengths, index)
        scored = ragged_positions(self.scored_lengths, index)
        return Sequences(
            token_ids=self.token_ids[tokens],
            lengths=self.lengths[index],
            scored_lengths=self.scored_lengths[index],
            scored=None if self.scored is None else self.scored[tokens],
            routes=None if self.routes is None else self.routes[tokens],
            images=None if self.images is None else [self.images[row] for row in index.tolist()],
            batch_row=None if self.batch_row is None else self.batch_row[index],
            per_token={name: values[scored] for name, values in self.per_token.items()},
            per_row={name: values[index] for name, values in self.per_row.items()},
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> Sequences:
        """The rows as a loss sees them, on another device: routes and images have been used."""
        weights = self.per_token.get("weights")
        return Sequences(
            token_ids=move(self.token_ids),
            lengths=move(self.lengths),
            scored_lengths=move(self.scored_lengths),
            scored=None if self.scored is None else move(self.scored),
            batch_row=None if self.batch_row is None else move(self.batch_row),
            images=self.images,
            per_token={name: move(values) for name, values in self.per_token.items()},
            per_row={name: move(values) for name, values in self.per_row.items()},
            counted=None if weights is None else move(torch.nonzero(weights).squeeze(1)),
            token_rows=move(self.row_of_token),
        )

    def without_trailing(self, token_id: int | None) -> Sequences:
        """The same rows without the tokens of that id at their ends, their first token aside;
        columns per token are not supported."""
        if token_id is None:
            return self
        assert not self.per_token and self.scored is None, "they would have to be cut too"
        assert self.batch_row is None, "a whole row has one score"
        rows, lengths, scored = [], self.lengths.tolist(), self.scored_lengths.tolist()
        for row, ids in enumerate(self.token_ids.split(lengths)):
            others = (ids != token_id).nonzero()
            end = 1
            if len(others):
                end = int(others[-1]) + 1
            rows.append(ids[:end])
            scored[row] = max(scored[row] - (len(ids) - end), 0)
        return Sequences(
            token_ids=torch.cat([self.token_ids[:0], *rows]),
            lengths=torch.tensor([len(ids) for ids in rows], dtype=torch.int64),
            scored_lengths=torch.tensor(scored, dtype=torch.int64),
            images=self.images,
            per_row=dict(self.per_row),
        )

    def with_columns(
        self,
        per_token: Mapping[str, Tensor] | None = None,
        per_row: Mapping[str, Tensor] | None = None,
    ) -> Sequences:
        """The same rows with further columns."""
        return Sequences(
            token_ids=self.token_ids,
            lengths=self.lengths,
            scored_lengths=self.scored_lengths,
            scored=self.scored,
            routes=self.routes,
            images=self.images,
            batch_row=self.batch_row,
            per_token={**self.per_token, **(per_token or {})},
            per_row={**self.per_row, **(per_row or {})},
        )


def ragged_positions(lengths: Tensor, index: Tensor) -> Tensor:
    """Flat positions of the rows `index` of a ragged column with `lengths`: int64
    [sum(lengths[index])]."""
    starts = torch.cumsum(lengths, 0) - lengths
    row_lengths = lengths[index]
    ends = torch.cumsum(row_lengths, 0)
    offset = torch.repeat_interleave(starts[index] - (ends - row_lengths), row_lengths)
    return torch.arange(int(row_lengths.sum()), dtype=torch.int64, device=lengths.device) + offset
