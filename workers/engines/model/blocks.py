"""Attention block by block: some queries with some keys, and the merge of what blocks give.

A query's output over all its keys is merged from those over parts of them by their log-sum-exp, in
float32 at least; the backward pass computes the probabilities again from the merged one, as
FlashAttention does (arXiv 2205.14135, appendix B.4). Blocks are products over tiles of queries, so
that windows and soft-capping work, and no more than some TILE_ELEMENTS scores exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

TILE_ELEMENTS = 2**23
"""Scores that are in memory at once, over all heads."""
FEWEST_QUERIES = 128
"""A tile has at least these queries of a block that has them."""
Chunks = Sequence[tuple[int, int]]
"""The places [begin, end) of a row that a rank has."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring queries of this rank's part and the keys of one rank's part in their sequence."""

    begin: int
    end: int
    """The queries, by their places in this rank's part."""
    keys: Tensor
    """int64: places in the other rank's part, in the order of their positions."""
    query_positions: Tensor
    key_positions: Tensor
    """int64: places in the sequence, its prompt first."""
    nearest: int
    farthest: int
    """The smallest and the largest distance of a query from a key, in positions."""

    def hidden(self, begin: int, end: int, window: int | None) -> Tensor | None:
        """bool [queries, keys]: the keys that each of the block's queries [begin, end) does not
        see; None if it sees all."""
        if self.nearest >= 0 and (window is None or self.farthest < window):
            return None
        distance = self.query_positions[begin:end, None] - self.key_positions
        hidden = distance < 0
        return hidden if window is None else hidden | (distance >= window)


Row = tuple[tuple[Block, ...], ...]
"""The blocks of this rank with its own part, with that of the rank before it, and so on round."""


def ring_blocks(
    lengths: Sequence[int],
    prefixes: Sequence[int],
    parts: Sequence[Chunks],
    rank: int,
) -> Row:
    """The blocks of `rank` in a row of segments (packing.py) whose ranks have `parts`; on the host."""
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    queries = list[tuple[int, int, int, int]]()
    place = 0
    for first, last in parts[rank]:
        for segment in range(len(lengths)):
            low, high = max(begins[segment], first), min(begins[segment + 1], last)
            if low < high:
                queries.append((segment, place + low - first, low, high))
        place += last - first
    row = []
    for step in range(len(parts)):
        blocks = []
        for segment, at, low, high in queries:
            prefix, start, before = prefixes[segment], begins[segment], 0
            pieces = list[tuple[int, int, int]]()
            if prefix >= 0:
                before = lengths[prefix]
                pieces.append((begins[prefix], begins[prefix + 1], 0))
            pieces.append((start, high, before))
            places, positions = _overlap(pieces, parts[rank - step])
            if not len(places):
                continue
            query_positions = torch.arange(low, high) - start + before
            blocks.append(
                Block(
                    begin=at,
                    end=at + high - low,
                    keys=places,
                    query_positions=query_positions,
                    key_positions=positions,
                    nearest=int(query_positions[0] - positions[-1]),
                    farthest=int(query_positions[-1] - positions[0]),
                )
            )
        row.append(tuple(blocks))
    return tuple(row)


def moved_row(row: Row, move: Callable[[Tensor], Tensor]) -> Row:
    """The same on another device."""
    result = []
    for blocks in row:
        moved = []
        for block in blocks:
            keys, queries = move(block.keys), move(block.query_positions)
            positions = move(block.key_positions)
            moved.append(
                replace(block, keys=keys, query_positions=queries, key_positions=positions)
            )
        result.append(tuple(moved))
    return tuple(result)


def _overlap(pieces: Sequence[tuple[int, int, int]], part: Chunks) -> tuple[Tensor, Tensor]:
    """The tokens of pieces (begin, end, position of the first) that are in `part`: (places in it,
    positions)."""
    places, positions = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for begin, end, position in pieces:
        place = 0
        for first, last in part:
            low = max(begin, first)
            tokens = torch.arange(low, max(low, min(end, last)))
            places.append(tokens - first + place)
            positions.append(tokens - begin + position)
            place += last - first
    return torch.cat(places), torch.cat(positions)


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are computed: scale, window (tokens that a query sees, itself too), soft cap."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@lru_cache(maxsize=8)
def segment_blocks(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Block, ...]:
    blocks, query, key = [], 0, 0
    for length, before in shapes:
        num_keys = before + length
        blocks.append(
            Block(
                begin=query,
                end=query + length,
                keys=torch.arange(key, key + num_keys, device=device),
                query_positions=torch.arange(before, num_keys, device=device),
                key_positions=torch.arange(num_keys, device=device),
                nearest=1 - length,
                farthest=num_keys - 1,
            )
        )
        query, key = query + length, key + num_keys
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class Tile:
    """Some queries of a block with the keys that any of them sees."""

    queries: slice
    """In the part."""
    keys: slice
    """In the block."""
    hidden: Tensor | None
    """bool [queries, keys]"""
    scores: Scores


def within(blocks: Sequence[Block], window: int | None) -> Iterator[Block]:
    """The blocks of which some query sees some key."""
    for block in blocks:
        if window is None or block.nearest < window:
            yield block


def tiles(block: Block, q: Tensor, scores: Scores) -> Iterator[Tile]:
    """The block cut along its queries, without keys that no query of a tile sees."""
    num_keys = len(block.keys)
    heads = q.shape[0] * q.shape[1]
    rows = max(FEWEST_QUERIES, TILE_ELEMENTS // (heads * num_keys))
    length = block.end - block.begin
    for begin in range(0, length, rows):
        end = min(begin + rows, length)
        last = num_keys
        if block.nearest <= 0:  # the block's last keys are its queries
            last -= length - end
        hidden = block.hidden(begin, end, scores.window)
        yield Tile(
            queries=slice(block.begin + begin, block.begin + end),
            keys=slice(0, last),
            hidden=None if hidden is None else hidden[:, :last],
            scores=scores,
        )


def by_key_head(heads: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [key-value heads, heads of each, tokens, head_dim]."""
    return heads.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def keys_and_values(visiting: Tensor, block: Block, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a block: [key-value heads, 1, keys, head_dim] each."""
    taken = visiting.index_select(0, block.keys).transpose(0, 1).unsqueeze(1)
    return taken[..., :head_dim], taken[..., head_dim:]


def _scores(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """[key-value heads, heads of each, queries, keys], none of them hidden."""
    product = (q @ k.transpose(2, 3)) * scores.scale
    if scores.softcap is None:
        return product
    return scores.softcap * torch.tanh(product / scores.softcap)


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, output: Tensor, total: Tensor) -> None:
    """Merges a tile into output and log-sum-exp: out = sum of exp(lse_i - lse) out_i."""
    queries = tile.queries
    k, v = k[:, :, tile.keys], v[:, :, tile.keys]
    scores = _scores(q[:, :, queries], k, tile.scores)
    if tile.hidden is not None:
        scores.masked_fill_(tile.hidden, -torch.inf)
    before = total[:, :, queries]
    merged = torch.logaddexp(before, torch.logsumexp(scores, -1))
    # A query that has seen no key yet has no sum to take the logarithm of.
    base = merged.masked_fill(merged == -torch.inf, 0.0)
    decay = torch.exp(before - base).unsqueeze(-1)
    probs = torch.exp(scores - base.unsqueeze(-1))
    output[:, :, queries] = output[:, :, queries] * decay + probs @ v
    total[:, :, queries] = merged


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    gradient: Tensor,
    total: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    grad_keys: Tensor,
) -> None:
    """Adds the gradients of a tile: P = exp(S - lse), dV = P' dO, dS = P (dO V' - delta),
    dQ = scale dS K, dK = scale dS' Q; a soft cap c multiplies dS by 1 - (S / c)^2."""
    queries, head_dim = tile.queries, q.shape[3]
    q, grad = q[:, :, queries], gradient[:, :, queries]
    k, v = k[:, :, tile.keys], v[:, :, tile.keys]
    scores = _scores(q, k, tile.scores)
    probs = torch.exp(scores - total[:, :, queries].unsqueeze(-1))
    if tile.hidden is not None:
        probs.masked_fill_(tile.hidden, 0.0)
    slope = probs * (grad @ v.transpose(2, 3) - delta[:, :, queries].unsqueeze(-1))
    if tile.scores.softcap is not None:
        slope *= 1 - (scores / tile.scores.softcap).square()
    slope *= tile.scores.scale
    grad_q[:, :, queries] += slope @ k
    # The gradient of a key head is the sum over its query heads.
    grad_keys[:, tile.keys, :head_dim] += (slope.transpose(2, 3) @ q).sum(1)
    grad_keys[:, tile.keys, head_dim:] += (probs.transpose(2, 3) @ grad).sum(1)
