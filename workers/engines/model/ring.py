"""Ring attention (arXiv 2310.01889) over packed ragged rows: keys and values go round the ranks that
share a row, each of which attends with its own queries to one rank's part after the other.

A rank has a chunk from the front of the row and the mirrored one from its back (zig-zag), so that all
have about as much to attend to. While a rank computes with one part, the next one is on its way. The
outputs of the parts are merged in float32 by their log-sum-exp, and the backward pass computes the
probabilities again from the merged one, as FlashAttention does (arXiv 2205.14135, appendix B.4). Keys
and values go round once more there, and their gradients travel with them, one part behind.

    row = ring_blocks(packing.lengths, packing.prefixes, parts, rank, device)
    output = ring_attention(queries, keys, values, row, sizes, group, Scores(scale=0.125))

Attention sinks (arXiv 2309.17453; learned, as GPT-OSS has them) are one more term of each query's sum,
with a value of zero. They need the sum itself, which other kernels do not tell, so rows that no ranks
share are computed here too where a model has them (block_attention).

Left out: a fused kernel. Blocks are float32 products over tiles of queries, so that windows and
soft-capping work, and no more than some TILE_ELEMENTS scores exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

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
    device: torch.device,
) -> Row:
    """The blocks of `rank` in a row of segments (packing.py) whose ranks have `parts`."""
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
                    keys=places.to(device),
                    query_positions=query_positions.to(device),
                    key_positions=positions.to(device),
                    nearest=int(query_positions[0] - positions[-1]),
                    farthest=int(query_positions[-1] - positions[0]),
                )
            )
        row.append(tuple(blocks))
    return tuple(row)


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


def ring_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    row: Row,
    sizes: Sequence[int],
    group: ProcessGroup,
    scores: Scores,
    sinks: Tensor | None = None,
) -> Tensor:
    """[tokens of the part, heads, head_dim] each (fewer heads of keys and values) -> the same of the
    outputs. sizes: tokens of every rank's part; sinks: [heads]. Collective, in the backward pass
    too."""
    output: Tensor = _Ring.apply(queries, keys, values, sinks, row, tuple(sizes), group, scores)
    return output


def block_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shapes: tuple[tuple[int, int], ...],
    scores: Scores,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same without other ranks, for segments one after the other of which each has (queries,
    keys before its own); keys stand segment by segment."""
    row = (_segment_blocks(shapes, keys.device),)
    output: Tensor = _Ring.apply(queries, keys, values, sinks, row, (len(keys),), None, scores)
    return output


@lru_cache(maxsize=8)
def _segment_blocks(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Block, ...]:
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


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        row: Row,
        sizes: tuple[int, ...],
        group: ProcessGroup | None,
        scores: Scores,
    ) -> Tensor:
        both = torch.cat([keys, values], -1).contiguous()
        exact = torch.promote_types(queries.dtype, torch.float32)
        q = _by_key_head(queries.to(exact), keys.shape[1])
        output = q.new_zeros(*q.shape[:3], values.shape[2])
        total = q.new_full(q.shape[:3], -torch.inf)
        for step, visiting in enumerate(_passed_round(both, sizes, group)):
            for block in row[step]:
                k, v = _of_block(visiting.to(exact), block, queries.shape[2])
                for tile in _tiles(block, q, scores):
                    _attend(q, k, v, tile, output, total)
        if sinks is not None:
            alone, total = total, torch.logaddexp(total, _by_query(sinks, total))
            output *= torch.exp(alone - total).unsqueeze(-1)
        flat = output.permute(2, 0, 1, 3).flatten(1, 2).to(queries.dtype)
        ctx.save_for_backward(queries, both, flat, total, sinks)
        ctx.row, ctx.sizes, ctx.group, ctx.scores = row, sizes, group, scores
        return flat

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, both, output, total, sinks = ctx.saved_tensors
        head_dim, kv_heads, exact = queries.shape[2], both.shape[1], total.dtype
        q, grad, out = (
            _by_key_head(heads.to(exact), kv_heads) for heads in (queries, gradient, output)
        )
        # The sum over keys of P dP is the output times its gradient.
        delta = (grad * out).sum(-1)
        grad_q = torch.zeros_like(q)
        travelling = _Travelling(both.shape[1:], ctx.sizes, ctx.group)
        for step, visiting in enumerate(_passed_round(both, ctx.sizes, ctx.group)):
            grads = torch.zeros_like(visiting, dtype=exact)
            for block in ctx.row[step]:
                k, v = _of_block(visiting.to(exact), block, head_dim)
                of_block = grads.new_zeros(kv_heads, len(block.keys), visiting.shape[2])
                for tile in _tiles(block, q, ctx.scores):
                    _attend_backward(q, k, v, tile, grad, total, delta, grad_q, of_block)
                grads.index_add_(0, block.keys, of_block.transpose(0, 1))
            travelling.add(step, grads)
        grad_both = travelling.home().to(both.dtype)
        grad_k, grad_v = grad_both.split([head_dim, both.shape[2] - head_dim], -1)
        flat = grad_q.permute(2, 0, 1, 3).flatten(1, 2).to(queries.dtype)
        grad_sinks = None
        if sinks is not None:
            # The value of a sink is zero, so that dP is: dS = P (0 - delta).
            slope = -torch.exp(_by_query(sinks, total) - total) * delta
            grad_sinks = slope.sum(-1).flatten().to(sinks.dtype)
        return flat, grad_k, grad_v, grad_sinks, None, None, None, None


def _by_query(sinks: Tensor, total: Tensor) -> Tensor:
    """[heads] -> [key-value heads, heads of each, 1]."""
    return sinks.to(total.dtype).view(*total.shape[:2], 1)


def _passed_round(
    local: Tensor, sizes: Sequence[int], group: ProcessGroup | None
) -> Iterator[Tensor]:
    """This rank's part, then that of the rank before it, and so on; the next one is received while
    the caller computes. One part alone needs no group."""
    visiting, count = local, len(sizes)
    if group is None:
        yield visiting
        return
    rank = group.rank()
    for step in range(1, count + 1):
        if step == count:
            yield visiting
            return
        incoming = local.new_empty(sizes[(rank - step) % count], *local.shape[1:])
        passing = _pass_on(visiting, incoming, group)
        yield visiting
        for request in passing:
            request.wait()
        visiting = incoming


class _Travelling:
    """Gradients of parts on their way round: each rank adds its own and passes them on to the next,
    so that they arrive where the part is from. They are sent while the next are computed."""

    def __init__(self, shape: Sequence[int], sizes: Sequence[int], group: ProcessGroup) -> None:
        self._shape, self._sizes, self._group = shape, sizes, group
        self._local: Tensor | None = None
        self._sent: Tensor | None = None
        self._received: Tensor | None = None
        self._passing: list[dist.Work] = []

    def add(self, step: int, gradients: Tensor) -> None:
        """This rank's gradients of the part that it had in `step`."""
        if step == 0:
            self._local = gradients
            return
        assert self._group is not None
        count, rank = len(self._sizes), self._group.rank()
        if step > 1:
            gradients += self._wait()
        # The rank before this one had the part that is next here.
        size = self._sizes[(rank - step - 1) % count]
        self._sent = gradients
        self._received = gradients.new_empty(size, *self._shape)
        self._passing = _pass_on(self._sent, self._received, self._group, tag=1)

    def home(self) -> Tensor:
        """The gradients of this rank's part."""
        assert self._local is not None
        if len(self._sizes) > 1:
            self._local += self._wait()
        return self._local

    def _wait(self) -> Tensor:
        for request in self._passing:
            request.wait()
        assert self._received is not None
        return self._received


def _pass_on(sent: Tensor, received: Tensor, group: ProcessGroup, tag: int = 0) -> list[dist.Work]:
    """To the next rank, from the one before."""
    count, rank = group.size(), group.rank()
    send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % count, tag=tag)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % count, tag=tag)
    return list(dist.batch_isend_irecv([send, receive]))


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries of a block with the keys that any of them sees."""

    queries: slice
    """In the part."""
    keys: slice
    """In the block."""
    hidden: Tensor | None
    """bool [queries, keys]"""
    scores: Scores


def _tiles(block: Block, q: Tensor, scores: Scores) -> Iterator[_Tile]:
    """The block cut along its queries, without keys that no query of a tile sees."""
    window, num_keys = scores.window, len(block.keys)
    if window is not None and block.nearest >= window:
        return
    heads = q.shape[0] * q.shape[1]
    rows = max(FEWEST_QUERIES, TILE_ELEMENTS // (heads * num_keys))
    length = block.end - block.begin
    for begin in range(0, length, rows):
        end = min(begin + rows, length)
        last = num_keys
        if block.nearest <= 0:  # the block's last keys are its queries
            last -= length - end
        hidden = block.hidden(begin, end, window)
        yield _Tile(
            queries=slice(block.begin + begin, block.begin + end),
            keys=slice(0, last),
            hidden=None if hidden is None else hidden[:, :last],
            scores=scores,
        )


def _by_key_head(heads: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [key-value heads, heads of each, tokens, head_dim]."""
    return heads.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _of_block(visiting: Tensor, block: Block, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a block: [key-value heads, 1, keys, head_dim] each."""
    taken = visiting.index_select(0, block.keys).transpose(0, 1).unsqueeze(1)
    return taken[..., :head_dim], taken[..., head_dim:]


def _scores(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """[key-value heads, heads of each, queries, keys], none of them hidden."""
    product = (q @ k.transpose(2, 3)) * scores.scale
    if scores.softcap is None:
        return product
    return scores.softcap * torch.tanh(product / scores.softcap)


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: _Tile, output: Tensor, total: Tensor) -> None:
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


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: _Tile,
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
