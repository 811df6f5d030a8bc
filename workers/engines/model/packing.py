"""Packing: several sequences one after the other in a single row without padding, and which tokens
of it belong together.

The row [5 6 7 8 | 9 9 | 4 4] holds segments of 4, 2 and 2 tokens. Each is a sequence of its own,
with positions [0 1 2 3 | 0 1 | 0 1], or goes on after another one: with prefixes=[-1, 0, 0] the
second and the third are two responses to the prompt 5 6 7 8, positions [0 1 2 3 | 4 5 | 4 5], each
of which sees the prompt and itself. It travels through the model's own forward code as keyword
arguments, so that every layer, also one that is recomputed in the backward pass, attends with the
segments of its own micro-batch. How it attends, and which models can be packed, is in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from workers.engines.model.blocks import Row, moved_row


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring segments of one shape: Run(2, 2, 4) are the two responses above."""

    count: int
    length: int
    """Tokens of each segment."""
    prefix: int = 0
    """Tokens that each sees before its own."""

    @property
    def num_queries(self) -> int:
        return self.count * self.length

    @property
    def num_keys(self) -> int:
        return self.count * (self.prefix + self.length)


@dataclass(frozen=True, slots=True)
class Packing:
    """The segments of one packed row; packing_of makes it."""

    position_ids: Tensor
    """int64 [1, tokens], from 0 on in each segment, or from the end of its prefix on."""
    ends: Tensor
    """int32 [segments + 1], cumulative lengths from 0 on."""
    longest: int
    """Tokens of the longest segment."""
    lengths: tuple[int, ...]
    """Tokens of each segment."""
    prefixes: tuple[int, ...]
    """The segment that each one goes on after, or -1."""
    runs: tuple[Run, ...]
    """In the order of the row."""
    keys: Tensor | None = None
    """int64 [keys]: the tokens that each segment sees, prefix first, segment by segment; None
    if each sees itself only."""
    key_ends: Tensor | None = None
    """int32 [segments + 1], the cumulative numbers of those."""
    part: RowPart | None = None
    """The tokens of the row that this rank computes, under context parallelism."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward: this for attention.py, and what
        transformers' own flash attention reads, which knows no prefixes and no parts."""
        if self.part is not None:
            return {"position_ids": self.position_ids[:, self.part.tokens], "packing": self}
        if self.keys is not None:
            return {"position_ids": self.position_ids, "packing": self}
        ends, longest = self.ends, self.longest
        lengths = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return {"position_ids": self.position_ids, "packing": self, **lengths}

    def moved(self, move: Callable[[Tensor], Tensor]) -> Packing:
        """The same on another device."""
        return replace(
            self,
            position_ids=move(self.position_ids),
            ends=move(self.ends),
            keys=None if self.keys is None else move(self.keys),
            key_ends=None if self.key_ends is None else move(self.key_ends),
            part=None if self.part is None else self.part.moved(move),
        )

    def padded(self, num_tokens: int) -> Packing:
        """The same with one more segment of `num_tokens` tokens at the end."""
        lengths, prefixes = [*self.lengths, num_tokens], [*self.prefixes, -1]
        return packing_of(lengths, prefixes)


@dataclass(frozen=True, slots=True)
class RowPart:
    """The tokens of a packed row that this rank computes, where the ranks of `group` share the row
    (context_parallel.py)."""

    group: ProcessGroup
    tokens: Tensor
    """int64: where the part's tokens are in the row, in the part's order."""
    sizes: tuple[int, ...]
    """Tokens of every rank's part."""
    seen: Packing | None = None
    """The part as segments whose keys are among the gathered ones of all ranks."""
    ring: Row | None = None
    """The part's queries with the keys of each rank's part, which go round. With neither, ranks
    exchange heads, and each attends over the whole row with some of them."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> RowPart:
        """The same on another device."""
        return replace(
            self,
            tokens=move(self.tokens),
            seen=None if self.seen is None else self.seen.moved(move),
            ring=None if self.ring is None else moved_row(self.ring, move),
        )


def packing_of(lengths: Sequence[int], prefixes: Sequence[int] | None = None) -> Packing:
    """The packing of segments with these lengths, each at least 1, in the order of the row; on the
    host.

    prefixes: for each segment the one that it goes on after, which has no prefix of its own, or -1.
    """
    before = list(prefixes) if prefixes is not None else [-1] * len(lengths)
    sizes = torch.tensor(list(lengths))
    ends = torch.cumsum(sizes, 0)
    begins = ends - sizes
    # A segment without prefix has -1, which reads the 0 at the end.
    shared = torch.tensor([*lengths, 0])[before]
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(begins - shared, sizes)
    shapes = zip(lengths, shared.tolist(), strict=True)
    runs = tuple(Run(len(list(run)), *shape) for shape, run in groupby(shapes))
    keys = key_ends = None
    if any(prefix >= 0 for prefix in before):
        keys = _keys(begins, sizes, shared, torch.tensor(before))
        key_ends = _from_zero(torch.cumsum(sizes + shared, 0))
    return Packing(
        position_ids=positions[None],
        ends=_from_zero(ends),
        longest=max(lengths),
        lengths=tuple(lengths),
        prefixes=tuple(before),
        runs=runs,
        keys=keys,
        key_ends=key_ends,
    )


def _keys(begins: Tensor, sizes: Tensor, shared: Tensor, prefixes: Tensor) -> Tensor:
    """Where the tokens that each segment sees are in the row: its prefix's, then its own."""
    starts = torch.stack([begins[prefixes], begins], 1).reshape(-1)
    counts = torch.stack([shared, sizes], 1).reshape(-1)
    ends = torch.cumsum(counts, 0)
    return torch.arange(int(ends[-1])) + torch.repeat_interleave(starts - (ends - counts), counts)


def _from_zero(ends: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
