"""Context parallelism: the ranks of a group share the tokens of a packed row.

Everything in a decoder but attention works token by token, so each rank computes its part of the
row, and only attention communicates. There are three exchanges:

- Heads (Ulysses, arXiv 2309.14509): the row is cut into contiguous parts of uneven sizes. One
  all-to-all gives each rank all tokens with some of the heads, another one takes the outputs back.
  Attention itself sees a whole row, so windows, soft-capping and shared prompts are as without it.
- Keys (arXiv 2407.21783, section 3.3.2): for query heads that the group does not divide. Each rank
  takes two chunks of the row, one from the front and the mirrored one from the back, so that all
  have about as much to attend to. Keys and values of all ranks are gathered, and a rank's queries
  attend to those before them; the gradients of keys and values are summed over ranks in float32.
- A ring (ring.py): the same chunks, but keys and values pass from rank to rank, so that a rank
  holds those of one other rank at a time.

The numbers for scored tokens are gathered once at the end (gather_reads), so every rank of the group
computes the loss of the whole row and differentiates its own part. Gradients of weights are then
sums over the group, as over data ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from workers.config import ContextExchange, TrainConfig
from workers.engines.model.blocks import ring_blocks
from workers.engines.model.packing import Packing, RowPart, Run
from workers.engines.model.rotary import depends_on_length
from workers.engines.model.split_plan import bounds


def check_context_parallel(model: PretrainedConfig, config: TrainConfig) -> None:
    """ValueError for settings and models whose rows can't be shared by config.cp ranks; needs no
    weights."""
    if config.cp == 1:
        return
    if not config.packing:
        raise ValueError(f"train.cp is {config.cp}, which cuts packed rows; set packing=true")
    if depends_on_length(model):
        raise ValueError(
            f"train.cp is {config.cp}, but the rotary angles of {model.model_type} depend on the "
            "length of a whole row; set cp=1"
        )
    heads = _query_heads(model)
    if config.cp_exchange is ContextExchange.ulysses and heads % (config.cp * config.tp):
        fitting = [size for size in range(1, heads + 1) if heads % (size * config.tp) == 0]
        raise ValueError(
            f"train.cp is {config.cp} with cp_exchange=ulysses, which must divide the {heads} query "
            f"heads over tp={config.tp}; set cp to one of {fitting}, or cp_exchange=auto"
        )


def exchange_of(model: PretrainedConfig, config: TrainConfig) -> ContextExchange:
    """The exchange that config.cp_exchange means for the model; never auto."""
    if config.cp_exchange is not ContextExchange.auto:
        return config.cp_exchange
    if _query_heads(model) % (config.cp * config.tp) == 0:
        return ContextExchange.ulysses
    return ContextExchange.allgather


def _query_heads(model: PretrainedConfig) -> int:
    return int(model.get_text_config().num_attention_heads)


def least_tokens(cp: int, exchange: ContextExchange) -> int:
    """The fewest tokens of a row of which each of `cp` ranks gets some."""
    return cp if exchange is ContextExchange.ulysses else 2 * cp


def cut_row(
    packing: Packing, group: ProcessGroup, exchange: ContextExchange, multiple: int = 1
) -> Packing:
    """The packing with this rank's part of the row. Sizes of parts are multiples of `multiple`,
    which must divide the row's tokens."""
    cp, rank = group.size(), group.rank()
    num_tokens = packing.position_ids.shape[1]
    assert num_tokens % multiple == 0, (
        f"{num_tokens} tokens, tp={multiple}: pad_time was not called"
    )
    units = num_tokens // multiple
    parts: list[list[tuple[int, int]]] = []
    for place in range(cp):
        chunks = [bounds(units, place, cp)]
        if exchange is not ContextExchange.ulysses:
            chunks = [bounds(units, chunk, 2 * cp) for chunk in (place, 2 * cp - 1 - place)]
        parts.append([(begin * multiple, end * multiple) for begin, end in chunks])
    sizes = tuple(sum(end - begin for begin, end in part) for part in parts)
    tokens = torch.cat([torch.arange(*chunk) for chunk in parts[rank]])
    part = RowPart(group=group, tokens=tokens, sizes=sizes)
    if exchange is ContextExchange.allgather:
        part = replace(part, seen=_seen(packing, parts, rank))
    elif exchange is ContextExchange.ring:
        ring = ring_blocks(packing.lengths, packing.prefixes, parts, rank)
        part = replace(part, ring=ring)
    return replace(packing, part=part)


def _seen(packing: Packing, parts: list[list[tuple[int, int]]], rank: int) -> Packing:
    """The chunks of `rank` as segments that go on after what stands before them in their
    sequences; keys are places in the gathered parts, each padded to the largest."""
    largest = max(sum(end - begin for begin, end in part) for part in parts)
    place_of = torch.empty(packing.position_ids.shape[1], dtype=torch.int64)
    for number, part in enumerate(parts):
        tokens = torch.cat([torch.arange(*chunk) for chunk in part])
        place_of[tokens] = number * largest + torch.arange(len(tokens))
    ends = torch.cumsum(torch.tensor(packing.lengths), 0).tolist()
    begins = [end - length for end, length in zip(ends, packing.lengths, strict=True)]
    runs, keys = list[Run](), list[Tensor]()
    for first, last in parts[rank]:
        for begin, end, prefix in zip(begins, ends, packing.prefixes, strict=True):
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            before = [torch.arange(begins[prefix], ends[prefix])] if prefix >= 0 else []
            places = torch.cat([*before, torch.arange(begin, high)])
            keys.append(place_of[places])
            runs.append(Run(1, high - low, len(places) - (high - low)))
    lengths = torch.tensor([run.length for run in runs])
    num_keys = torch.tensor([run.num_keys for run in runs])
    return Packing(
        position_ids=packing.position_ids[:, :0],
        ends=_ends(lengths),
        longest=int(lengths.max()),
        lengths=tuple(lengths.tolist()),
        prefixes=(-1,) * len(runs),
        runs=tuple(runs),
        keys=torch.cat(keys),
        key_ends=_ends(num_keys),
    )


def _ends(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(sizes, 0), (1, 0)).to(torch.int32)


def exchange_inputs(
    queries: Tensor, keys: Tensor, values: Tensor, part: RowPart
) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens of the part, heads, head_dim] each -> what this rank attends with: all tokens of the
    row and its share of the heads, or its queries and the gathered keys and values."""
    if part.seen is not None:
        gathered = _gather_tokens([keys, values], part)
        return queries, gathered[0], gathered[1]
    cp, heads, key_heads = part.group.size(), queries.shape[1], keys.shape[1]
    if heads % cp:
        raise ValueError(
            f"train.cp={cp} does not divide the {heads} query heads of a layer; set "
            "cp_exchange to allgather or ring"
        )
    # Where ranks share a key head, each gets a copy; the gradient is the copies' sum.
    copies = 1
    if cp % key_heads == 0:
        copies = cp // key_heads
    elif key_heads % cp:
        copies = heads // key_heads
    every = [queries, _repeat(keys, copies), _repeat(values, copies)]
    blocks = [tensor.reshape(len(tensor), cp, -1) for tensor in every]
    sent = torch.cat(blocks, -1).transpose(0, 1).flatten(0, 1)
    to_each = (len(queries),) * cp
    received = _AllToAll.apply(sent, to_each, part.sizes, part.group)
    widths = [block.shape[-1] for block in blocks]
    q, k, v = (
        block.unflatten(1, (-1, tensor.shape[2]))
        for block, tensor in zip(received.split(widths, 1), every, strict=True)
    )
    return q, k, v


def exchange_output(output: Tensor, part: RowPart) -> Tensor:
    """The output of attention, as [tokens of the part, heads, head_dim]."""
    if part.seen is not None:
        return output
    cp, num_tokens = part.group.size(), len(part.tokens)
    received = _AllToAll.apply(output.flatten(1), part.sizes, (num_tokens,) * cp, part.group)
    by_rank = received.view(cp, num_tokens, -1, output.shape[2])
    return by_rank.transpose(0, 1).reshape(num_tokens, -1, output.shape[2])


def gather_reads(numbers: dict[str, Tensor], reads: Tensor, total: int, group: ProcessGroup) -> Any:
    """Each tensor of `numbers`, with one element for each of this rank's `reads`, as [total] on every
    rank; `reads` of all ranks are 0..total-1, each once. Backward takes the rank's elements, as
    every rank differentiates the same loss."""
    whole = _GatherReads.apply(torch.stack(list(numbers.values())), reads, total, group)
    return dict(zip(numbers, whole.unbind(), strict=True))


def _repeat(heads: Tensor, copies: int) -> Tensor:
    """[tokens, heads, head_dim] -> [tokens, heads * copies, head_dim], copies side by side."""
    if copies == 1:
        return heads
    return heads.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Rows for each rank one after the other -> the rows from each rank; backward sends them back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: ProcessGroup,
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        sent, received = ctx.sizes
        return _all_to_all(gradient, received, sent, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=group)
    return result


def _gather_tokens(tensors: list[Tensor], part: RowPart) -> list[Tensor]:
    """Each [tokens of the part, heads, head_dim] as those of all ranks, each padded to the largest
    part; one collective."""
    flat = torch.cat([tensor.flatten(1) for tensor in tensors], 1)
    padding = max(part.sizes) - len(flat)
    gathered = _GatherRows.apply(torch.nn.functional.pad(flat, (0, 0, 0, padding)), part.group)
    widths = [tensor[0].numel() for tensor in tensors]
    result = []
    for tensor, block in zip(tensors, gathered.split(widths, 1), strict=True):
        result.append(block.unflatten(1, tensor.shape[1:]))
    return result


class _GatherRows(torch.autograd.Function):
    """[rows, width] -> those of all ranks; backward sums over ranks, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        result = rows.new_empty(group.size() * len(rows), rows.shape[1])
        dist.all_gather_single(result, rows.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        mine = total.new_empty(len(total) // ctx.group.size(), total.shape[1])
        dist.reduce_scatter_single(mine, total, group=ctx.group)
        return mine.to(gradient.dtype), None


class _GatherReads(torch.autograd.Function):
    """[numbers, reads of this rank] -> [numbers, total], the same on every rank; backward takes
    this rank's."""

    @staticmethod
    def forward(
        ctx: Any, numbers: Tensor, reads: Tensor, total: int, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(reads)
        whole = numbers.new_zeros(len(numbers), total)
        whole[:, reads] = numbers
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (reads,) = ctx.saved_tensors
        return gradient[:, reads], None, None, None
