"""The law of the losses: however rows are cut into micro-batches and ranks, loss, gradients and
metrics add up to the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.maths.samples import make_pairs, make_sequences, run_parts, run_whole
from workers.engines.base import LossFn
from workers.engines.shared.metrics import combine_metrics
from workers.losses.aggregation import Aggregation
from workers.losses.config import (
    Correction,
    CorrectionLevel,
    DPOLossConfig,
    PolicyLossConfig,
    RolloutCorrectionConfig,
    ValueLossConfig,
)
from workers.losses.language import distillation_loss, language_loss, with_pretraining
from workers.losses.policy import policy_loss
from workers.losses.preference import bradley_terry_loss, cost_model_loss, dpo_loss
from workers.losses.surrogates import POLICY_LOSSES
from workers.losses.value import value_loss
from workers.sequences import Sequences

CORRECTION = RolloutCorrectionConfig(correction=Correction.truncate, level=CorrectionLevel.sequence)


def policy(name: str) -> LossFn:
    return policy_loss(
        PolicyLossConfig(
            name=name,
            dual_clip=1.1,
            entropy_coefficient=0.1,
            kl_coefficient=0.1,
            rollout_correction=CORRECTION,
        )
    )


TOKEN_LOSSES: dict[str, LossFn] = {
    **{name: policy(name) for name in POLICY_LOSSES},
    "value": value_loss(ValueLossConfig()),
    "language": language_loss,
    "distillation": distillation_loss,
    "ptx": with_pretraining(policy("ppo_clip"), 0.3),
}
PAIR_LOSSES: dict[str, LossFn] = {
    "bradley_terry": bradley_terry_loss,
    "cost_model": cost_model_loss,
    "dpo": dpo_loss(DPOLossConfig(label_smoothing=0.1)),
}


def test_metrics_combine_by_their_names():
    left = {
        "kl": torch.tensor(1.0),
        "ratio_max": torch.tensor(-torch.inf),
        "ratio_min": torch.tensor(2.0),
    }
    right = {
        "kl": torch.tensor(2.0),
        "ratio_max": torch.tensor(3.0),
        "ratio_min": torch.tensor(0.5),
    }
    assert combine_metrics(left, right) == {"kl": 3.0, "ratio_max": 3.0, "ratio_min": 0.5}
    assert combine_metrics({}, right) == combine_metrics(right, {}) == right


def same(loss_fn: LossFn, sequences: Sequences, parts: list[list[int]]) -> None:
    torch.testing.assert_close(
        run_parts(loss_fn, sequences, parts), run_whole(loss_fn, sequences), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", list(TOKEN_LOSSES))
@settings(deadline=None, max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=7),
    st.sampled_from(list(Aggregation)),
    st.integers(0, 1000),
    st.booleans(),
)
def test_any_cut_of_the_rows_gives_the_same(
    name: str, rows: list[tuple[int, int]], aggregation: Aggregation, seed: int, masked: bool
):
    """rows: (scored tokens, number of the micro-batch); a micro-batch may be empty, and rows
    may be masked in part."""
    lengths = [length for length, _ in rows]
    mask = (
        torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.7
        if masked
        else None
    )
    sequences = make_sequences(lengths, seed, aggregation, mask)
    sequences = sequences.with_columns(per_row={"pretrain": torch.arange(len(rows)) % 2 == 1})
    same(
        TOKEN_LOSSES[name],
        sequences,
        [[i for i, (_, part) in enumerate(rows) if part == number] for number in range(4)],
    )


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
@settings(deadline=None, max_examples=6)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=5
    ),
    st.integers(0, 1000),
)
def test_any_cut_between_pairs_gives_the_same(
    name: str, pairs: list[tuple[int, int, int]], seed: int
):
    sequences = make_pairs(
        [length for chosen, rejected, _ in pairs for length in (chosen, rejected)], seed
    )
    parts = [
        [
            row
            for i, (_, _, part) in enumerate(pairs)
            if part == number
            for row in (2 * i + 1, 2 * i)
        ]
        for number in range(3)
    ]
    same(PAIR_LOSSES[name], sequences, parts)
