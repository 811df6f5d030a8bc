"""Micro-batches: every row once, under the budget, little padding, reads at the right places,
results back in the caller's order."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config

from workers.config import Precision, TrainConfig
from workers.engines.base import Head, Outputs
from workers.engines.model.packing import Packing, Run
from workers.engines.shared.micro_batches import (
    PAIR,
    Cutting,
    MicroBatch,
    chosen_tokens,
    empty_micro_batch,
    gather_outputs,
    make_micro_batches,
    pad_time,
)
from workers.engines.shared.rows_together import BLOCKS_PER_BUDGET, cut, pack
from workers.sequences import Sequences


@st.composite
def some_sequences(draw: st.DrawFn, prompts: int = 0) -> Sequences:
    """Tokens are numbered, so that each one says where it came from; with `prompts` several
    rows begin with the same ones."""
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), max_size=12))
    if prompts:
        rows = [(size % prompts, scored) for size, scored in rows]
    lengths = torch.tensor([1 + more + scored for more, scored in rows], dtype=torch.int64)
    scored = torch.tensor([scored for _, scored in rows], dtype=torch.int64)
    token_ids = torch.arange(100, 100 + int(lengths.sum()))
    if prompts:  # a prompt's tokens follow from its length alone
        begins = torch.cumsum(lengths, 0) - lengths
        for begin, (more, _) in zip(begins.tolist(), rows, strict=True):
            token_ids[begin : begin + more + 1] = 1000 + 50 * more + torch.arange(more + 1)
    return Sequences(
        token_ids=token_ids,
        lengths=lengths,
        scored_lengths=scored,
        per_token={"place": torch.arange(int(scored.sum()))},
        per_row={"uid": torch.arange(len(rows))},
    )


UNSCORED = Sequences(
    token_ids=torch.tensor([5, 6, 5, 6]),
    lengths=torch.tensor([2, 2]),
    scored_lengths=torch.tensor([0, 0]),
    per_token={"place": torch.arange(0)},
    per_row={"uid": torch.arange(2)},
)
"""Two rows with one prompt and nothing after it: its last token is not computed."""


@example(UNSCORED, Head.lm, 1, (True, True), 1)
@settings(max_examples=120, deadline=None)
@given(
    st.one_of(some_sequences(), some_sequences(prompts=3)),
    st.sampled_from(list(Head)),
    st.integers(1, 60),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.integers(1, 4),
)
def test_every_row_once_and_results_return_in_order(
    sequences: Sequences, head: Head, budget: int, how: tuple[bool, bool], multiple: int
) -> None:
    packing = how[0]
    made = make_micro_batches(sequences, head, Cutting(budget, *how))
    assert all(
        micro_batch.input_ids.numel() <= budget or len(micro_batch.rows) == 1
        for micro_batch in made
    )
    micro_batches = [pad_time(micro_batch, multiple) for micro_batch in made]
    rows = (
        torch.cat([micro_batch.rows for micro_batch in micro_batches])
        if micro_batches
        else torch.zeros(0)
    )
    assert sorted(rows.tolist()) == list(range(sequences.num_rows))
    for micro_batch in micro_batches:
        assert micro_batch.input_ids.shape[1] % multiple == 0
        assert (micro_batch.packing is not None) is packing
        assert torch.equal(micro_batch.sequences.per_row["uid"], micro_batch.rows)
    outputs = gather_outputs(
        micro_batches, [reads(micro_batch, head) for micro_batch in micro_batches], sequences
    )
    ends = torch.cumsum(sequences.lengths, 0)
    if not micro_batches:
        assert outputs == Outputs()
    elif head is Head.score:
        assert outputs.scores is not None
        assert torch.equal(outputs.scores, sequences.token_ids[ends - 1].float())
    else:
        # The token before each scored token, and the scored token itself.
        scored = [
            place
            for end, count in zip(ends.tolist(), sequences.scored_lengths.tolist(), strict=True)
            for place in range(end - count, end)
        ]
        assert outputs.values is not None and outputs.log_probs is not None
        ids = sequences.token_ids.tolist()
        assert outputs.values.tolist() == [ids[place - 1] for place in scored]
        assert outputs.log_probs.tolist() == [ids[place] for place in scored]


@settings(max_examples=120, deadline=None)
@given(
    st.one_of(some_sequences(), some_sequences(prompts=3)),
    st.data(),
    st.sampled_from([Head.lm, Head.value]),
    st.integers(1, 60),
    st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_any_tokens_may_be_the_scored_ones(
    sequences: Sequences, data: st.DataObject, head: Head, budget: int, how: tuple[bool, bool]
) -> None:
    """Tokens of an environment between those of the policy: only the policy's are read, and nothing
    after the last of them is computed."""
    total, starts = int(sequences.lengths.sum()), set()
    for begin in (torch.cumsum(sequences.lengths, 0) - sequences.lengths).tolist():
        starts.add(begin)
    drawn = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    chosen = [place for place in range(total) if drawn[place] and place not in starts]
    scored = torch.zeros(total, dtype=torch.bool)
    scored[chosen] = True
    counts = [int(row.sum()) for row in scored.split(sequences.lengths.tolist())]
    masked = replace(
        sequences,
        scored_lengths=torch.tensor(counts, dtype=torch.int64),
        scored=scored,
        per_token={"place": torch.arange(len(chosen))},
    )
    micro_batches = make_micro_batches(masked, head, Cutting(budget, *how))
    outputs = gather_outputs(
        micro_batches, [reads(micro_batch, head) for micro_batch in micro_batches], masked
    )
    ids = sequences.token_ids.tolist()
    if micro_batches:
        assert outputs.values is not None and outputs.log_probs is not None
        assert outputs.values.tolist() == [ids[place - 1] for place in chosen]
        assert outputs.log_probs.tolist() == [ids[place] for place in chosen]
    if how == (True, False):
        for micro_batch in micro_batches:
            rows = micro_batch.sequences.scored
            assert rows is not None
            needed = 0
            for row in rows.split(micro_batch.sequences.lengths.tolist()):
                needed += max(int(row.nonzero().max()) if row.any() else 0, 1)
            assert micro_batch.input_ids.numel() == needed


def reads(micro_batch: MicroBatch, head: Head) -> Outputs:
    """A model whose hidden state is the token."""
    read = micro_batch.input_ids.flatten()[micro_batch.read_positions].float()
    if head is Head.score:
        return Outputs(scores=read)
    assert torch.equal(micro_batch.sequences.per_token["place"], places(micro_batch.sequences))
    return Outputs(values=read, log_probs=micro_batch.targets.float())


def places(sequences: Sequences) -> Tensor:
    return sequences.per_token["place"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(40, 300))
def test_padding_and_blocks_cost_as_little_as_possible(widths: list[int], budget: int) -> None:
    values = np.array(widths)
    fixed = max(1, budget // BLOCKS_PER_BUDGET)
    found = sum(len(block) * values[block].max() + fixed for block in cut(values, budget))
    in_order = np.sort(values)[::-1]
    best = None
    for ends in product([False, True], repeat=len(widths) - 1):
        blocks = np.split(in_order, [place + 1 for place, end in enumerate(ends) if end])
        if all(len(block) * block[0] <= budget for block in blocks):
            cost = sum(len(block) * block[0] + fixed for block in blocks)
            best = cost if best is None else min(best, cost)
    assert found == best


def test_drawn_lengths_have_little_padding() -> None:
    """256 rows of 8 + 8..64 tokens, as in the benchmark: one block would compute 1.6 times the
    tokens."""
    lengths = 8 + np.random.default_rng(0).integers(8, 65, 256)
    padded = sum(len(block) * lengths[block].max() for block in cut(lengths, 16384))
    assert padded / lengths.sum() < 1.08


def test_an_empty_micro_batch_has_the_columns_and_reads_nothing() -> None:
    sequences = Sequences(
        token_ids=torch.arange(5),
        lengths=torch.tensor([5]),
        scored_lengths=torch.tensor([2]),
        per_token={"weights": torch.ones(2)},
        per_row={"uid": torch.zeros(1)},
    )
    for packing in (False, True):
        empty = empty_micro_batch(sequences, Head.lm, Cutting(60, packing, packing))
        assert (
            empty.input_ids.tolist() == [[0]]
            and not len(empty.read_positions)
            and not len(empty.targets)
        )
        assert empty.sequences.per_token["weights"].shape == (0,) and empty.sequences.num_rows == 0


@settings(max_examples=60, deadline=None)
@given(some_sequences(), st.sampled_from(list(Head)), st.integers(1, 60), st.integers(1, 5))
def test_a_packed_row_has_no_padding_and_keeps_labels_together(
    sequences: Sequences, head: Head, budget: int, labels: int
) -> None:
    """What Packing says of the row is what lies in it; rows of one label share a row, under the
    budget if there are several."""
    label = torch.arange(sequences.num_rows) % labels
    micro_batches = make_micro_batches(
        sequences.with_columns(per_row={PAIR: label}), head, Cutting(budget, True)
    )
    assert len(
        {int(one) for micro_batch in micro_batches for one in set(label[micro_batch.rows].tolist())}
    ) == sum(len(set(label[micro_batch.rows].tolist())) for micro_batch in micro_batches)
    for micro_batch in micro_batches:
        packing = micro_batch.packing
        assert packing is not None
        widths = (micro_batch.sequences.lengths - int(head is not Head.score)).clamp(min=1).tolist()
        assert list(packing.lengths) == widths == sorted(
            widths, reverse=True
        ) and packing.longest == max(widths)
        assert packing.ends.tolist() == [0, *np.cumsum(widths)] and micro_batch.input_ids.shape == (
            1,
            sum(widths),
        )
        assert packing.position_ids[0].tolist() == [
            place for width in widths for place in range(width)
        ]
        assert len(packing.runs) == len(set(widths))
        rows = micro_batch.sequences.token_ids.split(micro_batch.sequences.lengths.tolist())
        assert micro_batch.input_ids[0].tolist() == [
            token for row, width in zip(rows, widths, strict=True) for token in row[:width].tolist()
        ]
        assert sum(widths) <= budget or len(set(label[micro_batch.rows].tolist())) == 1


@settings(max_examples=100, deadline=None)
@given(
    some_sequences(prompts=4), st.sampled_from(list(Head)), st.integers(1, 60), st.integers(0, 5)
)
def test_shared_prompts_are_computed_once_and_seen_by_their_responses(
    sequences: Sequences, head: Head, budget: int, labels: int
) -> None:
    """Token by token: what a row's tokens see through Packing is the row up to them, at its
    positions."""
    if labels:
        label = torch.arange(sequences.num_rows) % labels
        sequences = sequences.with_columns(per_row={PAIR: label})
    micro_batches = make_micro_batches(sequences, head, Cutting(budget, True, True))
    for micro_batch in micro_batches:
        part = micro_batch.sequences
        packing = micro_batch.packing
        ids = micro_batch.input_ids[0].tolist()
        assert packing is not None
        prompts = [
            tuple(row[: len(row) - scored])
            for row, scored in zip(split_rows(part), part.scored_lengths.tolist(), strict=True)
        ]
        repeated = {prompt for prompt in prompts if prompts.count(prompt) > 1}
        seen = seen_by_token(packing)
        histories = [tuple(ids[place] for place in seen[token]) for token in range(len(ids))]
        assert [len(history) - 1 for history in histories] == packing.position_ids[0].tolist()
        widths = (part.lengths - int(head is not Head.score)).clamp(min=1).tolist()
        needed = [
            tuple(row[: width + 1][:place])
            for row, width in zip(split_rows(part), widths, strict=True)
            for place in range(1, width + 1)
        ]
        assert set(needed) <= set(histories)
        # The last token of a prompt with nothing scored after it is not needed.
        computed = dict.fromkeys(repeated, 0)
        for prompt, width in zip(prompts, widths, strict=True):
            if prompt in repeated:
                computed[prompt] = max(computed[prompt], min(len(prompt), width))
        for prompt, size in computed.items():
            assert histories.count(prompt[:size]) == 1


def test_a_large_group_is_cut_and_every_part_has_the_prompt() -> None:
    """Six responses of 5 tokens to a prompt of 4: 4 + 3 x 4 computed tokens fit into 16, so two
    parts."""
    rows = [[1, 2, 3, 4, 10 * row, 6, 7, 8, 9] for row in range(6)]
    sequences = Sequences(
        token_ids=torch.tensor(rows).flatten(),
        lengths=torch.full((6,), 9),
        scored_lengths=torch.full((6,), 5),
    )
    micro_batches = make_micro_batches(sequences, Head.lm, Cutting(16, True, True))
    assert [micro_batch.input_ids.shape[1] for micro_batch in micro_batches] == [16, 16]
    first = micro_batches[0]
    assert first.packing is not None and first.packing.runs == (Run(1, 4), Run(3, 4, 4))
    assert first.input_ids.tolist() == [[1, 2, 3, 4, 0, 6, 7, 8, 10, 6, 7, 8, 20, 6, 7, 8]]
    assert first.read_positions.tolist() == [3, 4, 5, 6, 7, 3, 8, 9, 10, 11, 3, 12, 13, 14, 15]


def split_rows(part: Sequences) -> list[list[int]]:
    return [row.tolist() for row in part.token_ids.split(part.lengths.tolist())]


def seen_by_token(packing: Packing) -> list[list[int]]:
    """For every token of the row, the tokens that it sees: its segment's keys up to itself."""
    num_tokens = sum(packing.lengths)
    keys = packing.keys.tolist() if packing.keys is not None else list(range(num_tokens))
    ends = packing.ends if packing.key_ends is None else packing.key_ends
    seen = []
    for segment, length in enumerate(packing.lengths):
        of_segment = keys[int(ends[segment]) : int(ends[segment + 1])]
        seen += [of_segment[: len(of_segment) - length + token + 1] for token in range(length)]
    return seen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(40, 120))
def test_packing_makes_few_micro_batches(widths: list[int], budget: int) -> None:
    """First-fit decreasing against every way there is: 11/9 of the fewest and 6/9 more at most
    (Dosa 2007)."""
    assert (
        len(pack(np.array(widths), budget)) <= 11 / 9 * fewest(sorted(widths), budget, []) + 6 / 9
    )


def fewest(widths: list[int], budget: int, room: list[int]) -> int:
    if not widths:
        return len(room)
    *rest, one = widths
    tried = {left: place for place, left in enumerate(room) if left >= one}
    counts = [
        fewest(rest, budget, [*room[:place], left - one, *room[place + 1 :]])
        for left, place in tried.items()
    ]
    return min([*counts, fewest(rest, budget, [*room, budget - one])])


def test_a_cpu_takes_as_many_tokens_as_memory_suggests() -> None:
    """What a layer stores, counted by hand: two norms 6 x 512 numbers, queries and outputs 2 x 512,
    keys and values 2 x 256, the MLP's two factors 2 x 2048 (tests/engines/test_stored_numbers.py
    counts tensors)."""
    sizes = Qwen2Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    )
    stored = 8 * (6 * 512 + 2 * 512 + 2 * 256 + 2 * 2048)
    fp32 = TrainConfig(precision=Precision.fp32)
    assert chosen_tokens(fp32, sizes, "cpu") == (512 << 20) // (4 * stored)
    sizes.num_hidden_layers = 16
    assert chosen_tokens(replace(fp32, tp=2), sizes, "cpu") == (512 << 20) // (4 * stored)
    assert chosen_tokens(fp32, sizes, "cuda") == 8192
    assert chosen_tokens(replace(fp32, micro_batch_tokens=77), sizes, "cpu") == 77
    sizes.num_hidden_layers = 1
    assert chosen_tokens(fp32, sizes, "cpu") == 2048


def test_a_budget_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens is 0"):
        Cutting(0, True)
