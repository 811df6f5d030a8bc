"""Micro-batches: rows packed one after the other under a token budget, and results put back in the caller's
order.

How rows are cut changes speed and memory, never results. Rows with the same per-row column `pair` are in one
micro-batch, as losses on pairs need it. packing=False makes right-padded blocks of rows of similar length
(causal attention: no mask, default positions), for models whose layers can't keep the sequences of a row
apart. Cutting one sequence in two is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from workers.engines.base import Head, Outputs
from workers.engines.model.packing import Packing, packing_of
from workers.sequences import Sequences, ragged_positions

PAIR = "pair"
"""Per-row column of labels: rows that share one are never cut apart."""
BLOCKS_PER_BUDGET = 128
"""One more block is worth its fixed cost if it saves budget / 128 tokens of padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rows [5, 6, 7 | 8, 9] and [5 | 6] for a language model, whose last tokens need no forward pass:

    packed: input_ids [[5, 6, 7, 8, 5]]                read_positions [2, 3, 4]  targets [8, 9, 6]
    a block: input_ids [[5, 6, 7, 8], [5, 0, 0, 0]]    read_positions [2, 3, 4]  targets [8, 9, 6]
    """

    sequences: Sequences
    """The rows of this micro-batch in its own order, longest first if packed, as the loss sees them."""
    rows: Tensor
    """int64 [rows], where those rows are in the caller's sequences (on the CPU)."""
    input_ids: Tensor
    """int64 [1, tokens] if packed, else [rows, time], right-padded with 0; [1, 1] if there are no rows."""
    packing: Packing | None
    """Where the sequences of a packed row are."""
    read_positions: Tensor
    """int64: positions in input_ids.flatten() whose hidden states are read: the one before each scored token,
    or, for Head.score, the last token of each row."""
    targets: Tensor
    """int64 [scored_tokens], the scored tokens."""


def make_micro_batches(
    sequences: Sequences, head: Head, budget_tokens: int, device: torch.device, *, packing: bool
) -> list[MicroBatch]:
    """All rows in micro-batches of at most `budget_tokens` tokens, padding included; one longer row (or pair)
    has one to itself."""
    # Nothing is predicted from the last token of a row, so a language model or critic does not compute it.
    widths = (sequences.lengths - int(head is not Head.score)).clamp(min=1)
    pair = sequences.per_row[PAIR].numpy() if PAIR in sequences.per_row else None
    parts = (pack if packing else cut)(widths.numpy(), budget_tokens, pair)
    return [_micro_batch(sequences, torch.from_numpy(rows), widths, head, device, packing) for rows in parts]


def empty_micro_batch(sequences: Sequences, head: Head, device: torch.device, *, packing: bool) -> MicroBatch:
    """No rows: one padding token that nothing reads, for a rank that must take part in collectives; same
    columns as `sequences`."""
    rows = torch.zeros(0, dtype=torch.int64)
    return _micro_batch(sequences, rows, sequences.lengths, head, device, packing)


def pack(widths: np.ndarray, budget_tokens: int, together: np.ndarray | None = None) -> list[np.ndarray]:
    """Row indices of each micro-batch, longest rows first in each: first-fit decreasing, at most 11/9 of the
    fewest possible + 6/9.

    together: a label for each row; rows of one label stay in one micro-batch, and are placed by their sum.
    """
    _check_budget(budget_tokens)
    _, unit = np.unique(np.arange(len(widths)) if together is None else together, return_inverse=True)
    tokens = np.bincount(unit, weights=widths).astype(np.int64)
    place = np.zeros(len(tokens), dtype=np.int64)
    room = np.zeros(len(tokens), dtype=np.int64)
    num_open = 0
    for one in np.argsort(-tokens, kind="stable"):
        fits = np.flatnonzero(room[:num_open] >= tokens[one])
        place[one] = fits[0] if len(fits) else num_open
        if not len(fits):
            room[num_open] = budget_tokens
            num_open += 1
        room[place[one]] -= tokens[one]
    order = np.lexsort((-widths, place[unit]))
    return np.split(order, np.cumsum(np.bincount(place[unit]))[:-1]) if len(order) else []


def cut(widths: np.ndarray, budget_tokens: int, together: np.ndarray | None = None) -> list[np.ndarray]:
    """Row indices of each block, longest rows first: least padded tokens + fixed cost of a block, each block
    under the budget.

    together: a label for each row; rows of one label stay in one block. Units (rows, or rows of one label)
    sorted by width, so that blocks are contiguous: f(i) = min_j f(j) + rows(j..i) * width(j) + cost, exact in
    O(units * units per block).
    """
    _check_budget(budget_tokens)
    if together is not None:
        return _cut_labelled(widths, budget_tokens, together)
    order = np.argsort(-widths, kind="stable")
    return [
        order[begin:end]
        for begin, end in _blocks(widths[order], np.ones(len(order), dtype=np.int64), budget_tokens)
    ]


def _check_budget(budget_tokens: int) -> None:
    if budget_tokens < 1:
        raise ValueError(f"micro_batch_tokens is {budget_tokens}; it must be at least 1")


def _cut_labelled(widths: np.ndarray, budget_tokens: int, together: np.ndarray) -> list[np.ndarray]:
    _, unit, num_rows = np.unique(together, return_inverse=True, return_counts=True)
    width = np.zeros(len(num_rows), dtype=np.int64)
    np.maximum.at(width, unit, widths)
    order = np.argsort(-width, kind="stable")
    rows_by_unit = np.argsort(unit, kind="stable")
    ends = np.cumsum(num_rows)
    members = [rows_by_unit[ends[one] - num_rows[one] : ends[one]] for one in order]
    return [
        np.concatenate(members[begin:end])
        for begin, end in _blocks(width[order], num_rows[order], budget_tokens)
    ]


def _blocks(width: np.ndarray, num_rows: np.ndarray, budget_tokens: int) -> list[tuple[int, int]]:
    """The units [begin, end) of each block, of units with descending width."""
    width = width.astype(np.int64)
    rows_before = np.concatenate([[0], np.cumsum(num_rows)])
    num_units = len(width)
    fixed = max(1, budget_tokens // BLOCKS_PER_BUDGET)
    best = np.zeros(num_units + 1, dtype=np.int64)
    begin_of = np.zeros(num_units + 1, dtype=np.int64)
    for end in range(1, num_units + 1):
        # No block that ends here has more rows than the budget holds at the smallest width in it.
        fewest = rows_before[end] - budget_tokens // width[end - 1]
        first = min(int(np.searchsorted(rows_before, fewest)), end - 1)
        begins = np.arange(first, end)
        tokens = (rows_before[end] - rows_before[begins]) * width[begins]
        cost = best[begins] + tokens + fixed
        cost[(tokens > budget_tokens) & (begins < end - 1)] = np.iinfo(np.int64).max
        choice = int(np.argmin(cost))
        best[end], begin_of[end] = cost[choice], first + choice
    blocks = []
    end = num_units
    while end > 0:
        blocks.append((int(begin_of[end]), end))
        end = int(begin_of[end])
    return blocks[::-1]


def pad_time(micro_batch: MicroBatch, multiple: int) -> MicroBatch:
    """The micro-batch with further padding columns until time divides by `multiple`; in a packed row they are
    one more sequence."""
    time = micro_batch.input_ids.shape[1]
    missing = -time % multiple
    if not missing:
        return micro_batch
    positions, packing = micro_batch.read_positions, micro_batch.packing
    if packing is not None:
        packing = packing_of([*packing.lengths, missing], micro_batch.input_ids.device)
    return replace(
        micro_batch,
        input_ids=torch.nn.functional.pad(micro_batch.input_ids, (0, missing)),
        packing=packing,
        read_positions=positions + torch.div(positions, time, rounding_mode="floor") * missing,
    )


def run_micro_batch(
    model: Callable[..., dict[str, Tensor]], micro_batch: MicroBatch, *, entropy: bool, temperature: float
) -> Outputs:
    """One pass of a ScoredModel, or of what wraps it."""
    numbers = model(
        micro_batch.input_ids,
        micro_batch.read_positions,
        micro_batch.targets,
        packing=micro_batch.packing,
        entropy=entropy,
        temperature=temperature,
    )
    return Outputs(**numbers)


def gather_outputs(micro_batches: list[MicroBatch], outputs: list[Outputs], sequences: Sequences) -> Outputs:
    """Outputs of all blocks, in the row order of `sequences` and on its device."""
    device = sequences.token_ids.device
    tokens = [ragged_positions(sequences.scored_lengths, micro_batch.rows) for micro_batch in micro_batches]
    result: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(Outputs)):
        parts = [_part(output, name) for output in outputs]
        present = [part.to(device) for part in parts if part is not None]
        if not present:
            continue
        places = [micro_batch.rows for micro_batch in micro_batches] if name == "scores" else tokens
        merged = torch.empty(sum(len(place) for place in places), dtype=torch.float32, device=device)
        merged[torch.cat(places)] = torch.cat(present).float()
        result[name] = merged
    return Outputs(**result)


def _part(output: Outputs, name: str) -> Tensor | None:
    by_name = {
        "log_probs": output.log_probs,
        "entropy": output.entropy,
        "values": output.values,
        "scores": output.scores,
    }
    return by_name[name]


def _micro_batch(
    sequences: Sequences, rows: Tensor, widths: Tensor, head: Head, device: torch.device, packing: bool
) -> MicroBatch:
    part, width = sequences.rows(rows), widths[rows]
    starts, input_ids = _packed(part, width) if packing else _block(part, width)
    columns = _scored_columns(part)
    targets = part.token_ids[(torch.cumsum(part.lengths, 0) - part.lengths)[part.row_of_token] + columns]
    read_positions = (
        starts + part.lengths - 1 if head is Head.score else starts[part.row_of_token] + columns - 1
    )
    return MicroBatch(
        sequences=_to(part, device),
        rows=rows,
        input_ids=input_ids.to(device),
        packing=packing_of(width.tolist() or [1], device) if packing else None,
        read_positions=read_positions.to(device),
        targets=targets.to(device),
    )


def _packed(part: Sequences, width: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row begins in the flattened ids, and the ids."""
    ids = part.token_ids[_first_tokens(part, width)] if len(width) else torch.zeros(1, dtype=torch.int64)
    return torch.cumsum(width, 0) - width, ids[None]


def _block(part: Sequences, width: Tensor) -> tuple[Tensor, Tensor]:
    time = int(width.max()) if len(width) else 1
    input_ids = torch.zeros(max(1, len(width)), time, dtype=torch.int64)
    if len(width):
        input_ids[torch.arange(time) < width[:, None]] = part.token_ids[_first_tokens(part, width)]
    return torch.arange(len(width)) * time, input_ids


def _first_tokens(part: Sequences, width: Tensor) -> Tensor:
    """int64 [sum(width)]: where the first tokens of each row are in part.token_ids."""
    shift = (torch.cumsum(part.lengths, 0) - part.lengths) - (torch.cumsum(width, 0) - width)
    return torch.arange(int(width.sum())) + torch.repeat_interleave(shift, width)


def _scored_columns(part: Sequences) -> Tensor:
    """int64 [scored_tokens]: the column of each scored token in its row."""
    first = part.lengths - part.scored_lengths
    before = torch.cumsum(part.scored_lengths, 0) - part.scored_lengths
    return torch.arange(part.num_scored_tokens) + torch.repeat_interleave(first - before, part.scored_lengths)


def _to(part: Sequences, device: torch.device) -> Sequences:
    if device.type == "cpu":
        return part
    return Sequences(
        token_ids=part.token_ids.to(device),
        lengths=part.lengths.to(device),
        scored_lengths=part.scored_lengths.to(device),
        per_token={name: values.to(device) for name, values in part.per_token.items()},
        per_row={name: values.to(device) for name, values in part.per_row.items()},
    )
