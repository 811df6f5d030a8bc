"""Where the computed tokens of a micro-batch's rows are in its input_ids: packed one after the
other, behind the prompts that they share, or in a right-padded block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.engines.model.packing import Packing, packing_of
from workers.engines.shared.rows_together import computed_tokens, prompts_of
from workers.sequences import Sequences


@dataclass(frozen=True, slots=True)
class Segments:
    """A packed row: the shared prompts, then what each row has of its own."""

    shared: Tensor
    """int64 [prompts]: a row that begins with each shared prompt."""
    shared_lengths: Tensor
    """int64 [prompts]."""
    prompt: Tensor
    """int64 [rows]: which shared prompt each row goes on after, or -1."""
    cuts: Tensor
    """int64 [rows]: tokens of each row that are in its shared prompt."""
    widths: Tensor
    """int64 [rows]: tokens of each row that are computed, shared ones included."""

    @property
    def lengths(self) -> Tensor:
        """int64 [prompts + rows]: tokens of each segment; a row that ends with its prompt has
        an empty one."""
        return torch.cat([self.shared_lengths, self.widths - self.cuts])

    def row(self, part: Sequences) -> tuple[Tensor, Packing]:
        """The ids int64 [1, tokens] and the packing; one padding token if there are no rows."""
        lengths = self.lengths
        if not len(lengths):
            return torch.zeros(1, 1, dtype=torch.int64), packing_of([1])
        places = self.indices(part)
        prefixes = torch.cat([torch.full_like(self.shared, -1), self.prompt])
        filled = lengths > 0
        packing = packing_of(lengths[filled].tolist(), prefixes[filled].tolist())
        return part.token_ids[places][None], packing

    def indices(self, part: Sequences) -> Tensor:
        """int64 [tokens]: where the tokens of the row are in part.token_ids; -1 for one that only
        pads."""
        lengths = self.lengths
        if not len(lengths):
            return torch.full((1,), -1)
        begins = torch.cumsum(part.lengths, 0) - part.lengths
        starts = torch.cat([begins[self.shared], begins + self.cuts])
        ends = torch.cumsum(lengths, 0)
        return torch.arange(int(ends[-1])) + torch.repeat_interleave(
            starts - (ends - lengths), lengths
        )

    def positions(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where the tokens at `columns` of `rows` are in the packed row."""
        ends = torch.cumsum(self.lengths, 0)
        begins = ends - self.lengths
        num_shared = len(self.shared)
        in_prompt = columns < self.cuts[rows]
        prompt = self.prompt[rows].clamp(min=0)
        of_prompt = begins[prompt] + columns if num_shared else columns
        return torch.where(
            in_prompt, of_prompt, begins[num_shared + rows] + columns - self.cuts[rows]
        )


def segments_of(part: Sequences, width: Tensor, *, share: bool) -> Segments:
    """Prompts that at least two rows begin with are shared, longest first."""
    none = torch.zeros(0, dtype=torch.int64)
    num_rows = part.num_rows
    alone = Segments(
        none, none, torch.full((num_rows,), -1), torch.zeros(num_rows, dtype=torch.int64), width
    )
    if not share or num_rows < 2:
        return alone
    prompts = prompts_of(part)
    _, first, label, counts = np.unique(
        prompts.label, return_index=True, return_inverse=True, return_counts=True
    )
    sizes = computed_tokens(prompts, width.numpy())[first]
    several = np.flatnonzero((counts > 1) & (sizes > 0))
    if not len(several):
        return alone
    several = several[np.argsort(-sizes[several], kind="stable")]
    number = np.full(len(first), -1, dtype=np.int64)
    number[several] = np.arange(len(several))
    prompt = torch.from_numpy(number[label])
    shared_lengths = torch.from_numpy(sizes[several])
    cuts = torch.where(prompt >= 0, shared_lengths[prompt.clamp(min=0)], 0).minimum(width)
    return Segments(torch.from_numpy(first[several]), shared_lengths, prompt, cuts, width)


def padded_block(part: Sequences, width: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row begins in the flattened block, int64 [rows], and the block's ids, int64
    [max(1, rows), time], padded with 0."""
    time = int(width.max()) if len(width) else 1
    input_ids = torch.zeros(max(1, len(width)), time, dtype=torch.int64)
    if len(width):
        input_ids[torch.arange(time) < width[:, None]] = part.token_ids[token_indices(part, width)]
    return torch.arange(len(width)) * time, input_ids


def block_indices(part: Sequences, width: Tensor, input_ids: Tensor) -> Tensor:
    """int64 [rows * time]: where the tokens of a block are in part.token_ids; -1 for padding."""
    indices = torch.full(input_ids.shape, -1)
    if len(width):
        indices[torch.arange(input_ids.shape[1]) < width[:, None]] = token_indices(part, width)
    return indices.flatten()


def token_indices(part: Sequences, width: Tensor) -> Tensor:
    """int64 [sum(width)]: where the first tokens of each row are in part.token_ids."""
    shift = (torch.cumsum(part.lengths, 0) - part.lengths) - (torch.cumsum(width, 0) - width)
    return torch.arange(int(width.sum())) + torch.repeat_interleave(shift, width)


def rows_and_columns(width: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [sum(width)] each, of every token that is computed."""
    rows = torch.repeat_interleave(torch.arange(len(width)), width)
    return rows, torch.arange(int(width.sum())) - (torch.cumsum(width, 0) - width)[rows]
