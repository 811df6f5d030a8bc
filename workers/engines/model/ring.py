"""Ring attention (arXiv 2310.01889) over packed ragged rows: keys and values go round the ranks that
share a row, each of which attends with its own queries to one rank's part after the other.

A rank has a chunk from the front of the row and the mirrored one from its back (zig-zag), so that all
have about as much to attend to. While a rank computes with one part (blocks.py), the next one is on
its way. In the backward pass keys and values go round once more, and their gradients travel with
them, one part behind.

    row = ring_blocks(packing.lengths, packing.prefixes, parts, rank)
    output = ring_attention(queries, keys, values, row, sizes, group, Scores(scale=0.125))

Attention sinks (arXiv 2309.17453; learned, as GPT-OSS has them) are one more term of each query's sum,
with a value of zero. They need the sum itself, which other kernels do not tell, so rows that no ranks
share are computed here too where a model has them (block_attention).

Left out: a fused kernel for the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from workers.engines.model.blocks import (
    Row,
    Scores,
    attend,
    attend_backward,
    by_key_head,
    keys_and_values,
    segment_blocks,
    tiles,
    within,
)


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
    row = (segment_blocks(shapes, keys.device),)
    output: Tensor = _Ring.apply(queries, keys, values, sinks, row, (len(keys),), None, scores)
    return output


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
        q = by_key_head(queries.to(exact), keys.shape[1])
        output = q.new_zeros(*q.shape[:3], values.shape[2])
        total = q.new_full(q.shape[:3], -torch.inf)
        for step, visiting in enumerate(_passed_round(both, sizes, group)):
            visiting = visiting.to(exact)
            for block in within(row[step], scores.window):
                k, v = keys_and_values(visiting, block, queries.shape[2])
                for tile in tiles(block, q, scores):
                    attend(q, k, v, tile, output, total)
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
            by_key_head(heads.to(exact), kv_heads) for heads in (queries, gradient, output)
        )
        # The sum over keys of P dP is the output times its gradient.
        delta = (grad * out).sum(-1)
        grad_q = torch.zeros_like(q)
        travelling = _Travelling(both.shape[1:], ctx.sizes, ctx.group)
        for step, visiting in enumerate(_passed_round(both, ctx.sizes, ctx.group)):
            visiting = visiting.to(exact)
            grads = torch.zeros_like(visiting)
            for block in within(ctx.row[step], ctx.scores.window):
                k, v = keys_and_values(visiting, block, head_dim)
                of_block = grads.new_zeros(kv_heads, len(block.keys), visiting.shape[2])
                for tile in tiles(block, q, ctx.scores):
                    attend_backward(q, k, v, tile, grad, total, delta, grad_q, of_block)
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
        self._passing = _pass_on(self._sent, self._received, self._group)

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


def _pass_on(sent: Tensor, received: Tensor, group: ProcessGroup) -> list[dist.Work]:
    """To the next rank, from the one before. All ranks pass parts and gradients in the same order, which
    is all that NCCL tells messages apart by: it has no tags."""
    count, rank = group.size(), group.rank()
    send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % count)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % count)
    return list(dist.batch_isend_irecv([send, receive]))
