"""Attention with soft-capped scores (Gemma 2, section 2.2), which no fused kernel has, in products of
matrices; and the mask of what each token sees."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import repeat_kv

MOST_SCORES, FEWEST_QUERIES = 2**25, 128
"""Soft-capped scores that are in memory at once, over all heads, with at least so many queries."""


def capped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    """Scores within +- softcap (Gemma 2, section 2.2), which no fused kernel does; [rows, heads,
    time, ...] -> [rows, time, heads, ...]. Of long rows the scores of some queries at a time, which
    the backward pass computes again, with no more keys than those see.
    """
    rows, heads, time, _ = query.shape
    seen = key.shape[2]
    if rows * heads * time * seen <= MOST_SCORES:
        return _capped_whole(query, key, value, scale, window, softcap)
    step = max(FEWEST_QUERIES, MOST_SCORES // (heads * seen))
    outputs = []
    for row, begin in product(range(rows), range(0, time, step)):
        part = query[row, None, :, begin : begin + step]
        end = seen - time + begin + part.shape[2]
        start = 0 if window is None else max(0, end - part.shape[2] - window + 1)
        keys, values = (heads[row, None, :, start:end] for heads in (key, value))
        outputs.append(
            checkpoint(
                _capped_whole,
                *(part, keys, values, scale, window, softcap),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(outputs, 1).unflatten(1, (rows, time)).squeeze(0)


def _capped_whole(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    """The same with all scores at once."""
    copies = query.shape[1] // key.shape[1]
    scores = softcap * torch.tanh(
        query @ repeat_kv(key, copies).transpose(2, 3) * (scale / softcap)
    )
    hidden = ~visible(query.shape[2], key.shape[2], window, query.device)
    probs = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.float32).to(
        query.dtype
    )
    return (probs @ repeat_kv(value, copies)).transpose(1, 2)


def visible(time: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """bool [time, seen]: which tokens (columns) each of the last `time` tokens (rows) sees:
    itself and window - 1 before it."""
    mask = torch.ones(time, seen, dtype=torch.bool, device=device).tril_(seen - time)
    return mask if window is None else mask.triu_(seen - time + 1 - window)
