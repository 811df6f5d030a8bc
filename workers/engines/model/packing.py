"""Packing: several sequences one after the other in a single row without padding, and which tokens of it
belong together.

The row [5 6 7 8 | 9 9 | 4 4] holds sequences of 4, 2 and 2 tokens: positions [0 1 2 3 | 0 1 | 0 1], runs ((1,
4), (2, 2)). It travels through the model's own forward code as keyword arguments, so that every layer, also
one that is recomputed in the backward pass, attends with the lengths of its own micro-batch. How it attends,
and which models can be packed, is in attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

Run = tuple[int, int]
"""How many sequences, neighbours of equal length, and the tokens of each."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The sequences of one packed row; packing_of builds it."""

    position_ids: Tensor
    """int64 [1, tokens], from 0 on in each sequence."""
    ends: Tensor
    """int32 [sequences + 1], cumulative lengths from 0 on."""
    longest: int
    """Tokens of the longest sequence."""
    runs: tuple[Run, ...]
    """In the order of the row."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        result = []
        for sequences, length in self.runs:
            result += [length] * sequences
        return result

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward code: for attention.py, and for transformers' own flash
        attention."""
        ends, longest = self.ends, self.longest
        lengths = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return {"position_ids": self.position_ids, "packing": self, **lengths}


def packing_of(lengths: list[int], device: torch.device) -> Packing:
    """The Packing of a row of sequences with these lengths, each at least 1."""
    sizes = torch.tensor(lengths)
    ends = torch.cumsum(sizes, 0)
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - sizes, sizes)
    return Packing(
        position_ids=positions[None].to(device),
        ends=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32),
        longest=max(lengths),
        runs=tuple((len(list(run)), length) for length, run in groupby(lengths)),
    )
