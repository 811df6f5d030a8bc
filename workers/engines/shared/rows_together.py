"""Which rows go into which micro-batch: packed rows by first-fit decreasing, blocks of similar rows
by dynamic programming.

Only counts tokens; workers/engines/shared/micro_batches.py builds the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workers.sequences import Sequences

BLOCKS_PER_BUDGET = 128
"""One more block is worth its fixed cost if it saves budget / 128 tokens of padding."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Which rows begin with the same prompt."""

    label: np.ndarray
    """int64 [rows], equal for equal prompts."""
    num_tokens: np.ndarray
    """int64 [rows]: tokens before the first scored one."""


def prompts_of(sequences: Sequences) -> Prompts:
    """The prompts of all rows, told apart by their tokens, their images, and by the experts that
    tokens go to."""
    num_tokens = sequences.prompt_lengths.numpy()
    begins = (torch.cumsum(sequences.lengths, 0) - sequences.lengths).numpy()
    ids = sequences.token_ids.cpu().numpy()
    labels: dict[bytes, int] = {}
    label = np.empty(len(begins), dtype=np.int64)
    routes = None if sequences.routes is None else sequences.routes.numpy()
    for row, (begin, size) in enumerate(zip(begins, num_tokens, strict=True)):
        prompt = ids[begin : begin + size].tobytes()
        if routes is not None:
            prompt += routes[begin : begin + size].tobytes()
        if sequences.images is not None:
            prompt += "".join(image.key for image in sequences.images[row]).encode()
        label[row] = labels.setdefault(prompt, len(labels))
    return Prompts(label, num_tokens)


def pack_prompts(
    widths: np.ndarray, prompts: Prompts, budget_tokens: int, together: np.ndarray | None = None
) -> list[np.ndarray]:
    """Row indices of each micro-batch, where the rows of a prompt that are in one micro-batch share
    its tokens.

    A prompt's rows (or rows of one label of `together`) stay in one micro-batch as far as the
    budget goes; a prompt with more of them is in several.
    """
    rows_of: dict[int, list[np.ndarray]] = {}
    for unit in units(len(widths), together):
        rows_of.setdefault(int(prompts.label[unit[0]]), []).append(unit)
    label = np.empty(len(widths), dtype=np.int64)
    computed = computed_tokens(prompts, widths)
    tokens: list[int] = []
    for own_units in rows_of.values():
        filled = budget_tokens + 1
        for unit in own_units:
            alike = bool((prompts.label[unit] == prompts.label[unit[0]]).all())
            shared = int(computed[unit[0]]) if alike else 0
            more = int(np.maximum(widths[unit] - shared, 0).sum())
            if not alike or filled + more > budget_tokens:
                filled = shared
                tokens.append(0)
            filled += more
            tokens[-1] = filled
            label[unit] = len(tokens) - 1
            if not alike:
                filled = budget_tokens + 1  # no other row shares a prompt with both
    place = first_fit_decreasing(np.array(tokens, dtype=np.int64), budget_tokens)[label]
    # Rows of one shape are neighbours, so that they attend in one call.
    order = np.lexsort((prompts.label, prompts.num_tokens, -widths, place))
    return np.split(order, np.cumsum(np.bincount(place))[:-1]) if len(order) else []


def computed_tokens(prompts: Prompts, widths: np.ndarray) -> np.ndarray:
    """int64 [rows]: tokens of each row's prompt that any row with it computes. That is all of them,
    unless nothing is scored in any of these rows."""
    widest = np.zeros(int(prompts.label.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(widest, prompts.label, widths)
    return np.minimum(prompts.num_tokens, widest[prompts.label])


def units(num_rows: int, together: np.ndarray | None) -> list[np.ndarray]:
    """Rows that must not be cut apart, in the order of their first."""
    if together is None:
        return list(np.arange(num_rows).reshape(-1, 1))
    members: dict[int, list[int]] = {}
    for row, name in enumerate(together.tolist()):
        members.setdefault(name, []).append(row)
    return list(map(np.array, members.values()))


def pack(
    widths: np.ndarray, budget_tokens: int, together: np.ndarray | None = None
) -> list[np.ndarray]:
    """Row indices of each micro-batch, longest rows first in each: first-fit decreasing, at most
    11/9 of the fewest possible + 6/9.

    together: a label for each row; rows of one label stay in one micro-batch, and are placed by
    their sum.
    """
    _, unit = np.unique(
        np.arange(len(widths)) if together is None else together, return_inverse=True
    )
    tokens = np.bincount(unit, weights=widths).astype(np.int64)
    place = first_fit_decreasing(tokens, budget_tokens)[unit]
    order = np.lexsort((-widths, place))
    return np.split(order, np.cumsum(np.bincount(place))[:-1]) if len(order) else []


def first_fit_decreasing(tokens: np.ndarray, budget_tokens: int) -> np.ndarray:
    """int64: the bin of each item, the largest placed first, each into the first bin that it
    fits in."""
    place = np.zeros(len(tokens), dtype=np.int64)
    free = np.zeros(len(tokens), dtype=np.int64)
    num_open = 0
    for item in np.argsort(-tokens, kind="stable"):
        fits = np.flatnonzero(free[:num_open] >= tokens[item])
        if len(fits):
            place[item] = fits[0]
        else:
            place[item] = num_open
            free[num_open] = budget_tokens
            num_open += 1
        free[place[item]] -= tokens[item]
    return place


def cut(
    widths: np.ndarray, budget_tokens: int, together: np.ndarray | None = None
) -> list[np.ndarray]:
    """Row indices of each block, longest rows first: least padded tokens + fixed cost of a block,
    each block under the budget.

    together: a label for each row; rows of one label stay in one block. Units (rows, or rows of one
    label) sorted by width, so that blocks are contiguous: f(i) = min_j f(j) + rows(j..i) * width(j)
    + cost, exact in O(units * units per block).
    """
    if together is not None:
        return _cut_labelled(widths, budget_tokens, together)
    order = np.argsort(-widths, kind="stable")
    blocks = _blocks(widths[order], np.ones(len(order), dtype=np.int64), budget_tokens)
    return [order[begin:end] for begin, end in blocks]


def _cut_labelled(widths: np.ndarray, budget_tokens: int, together: np.ndarray) -> list[np.ndarray]:
    _, unit, num_rows = np.unique(together, return_inverse=True, return_counts=True)
    width = np.zeros(len(num_rows), dtype=np.int64)
    np.maximum.at(width, unit, widths)
    order = np.argsort(-width, kind="stable")
    rows_by_unit = np.argsort(unit, kind="stable")
    ends = np.cumsum(num_rows)
    members = [rows_by_unit[ends[label] - num_rows[label] : ends[label]] for label in order]
    blocks = _blocks(width[order], num_rows[order], budget_tokens)
    return [np.concatenate(members[begin:end]) for begin, end in blocks]


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
