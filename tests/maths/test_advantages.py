"""Advantages against hand-computed numbers and plain Python loops."""

from __future__ import annotations

import itertools
import math
import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from controllers import advantages as adv
from controllers.covariance import select_for_clip_cov, select_for_kl_cov

ragged = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def tokens(lengths: list[int], seed: int) -> Tensor:
    return torch.randn(
        sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def per_row(values: Tensor, lengths: list[int]) -> list[list[float]]:
    return [row.tolist() for row in values.split(lengths)]


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    result = []
    for t in range(len(rewards)):
        total = 0.0
        for s in range(t, len(rewards)):
            next_value = values[s + 1] if s + 1 < len(values) else 0.0
            total += (gamma * lam) ** (s - t) * (rewards[s] + gamma * next_value - values[s])
        result.append(total)
    return result


def test_gae_by_hand():
    # deltas: 0 + 0.5*2 - 1 = 0 and 3 + 0 - 2 = 1; advantages: 0 + 0.5*0.5*1 and 1. Second row: 4 -
    # 5.
    rewards, values = torch.tensor([0.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 5.0])
    advantages, returns = adv.gae(rewards, values, torch.tensor([2, 0, 1]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.25, 1.0, -1.0]
    assert returns.tolist() == [1.25, 3.0, 4.0]


@settings(deadline=None, max_examples=15)
@given(ragged, st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_gae_and_returns_are_the_naive_sums(
    lengths: list[int], seed: int, gamma: float, lam: float
):
    rewards, values = tokens(lengths, seed), tokens(lengths, seed + 1)
    advantages, returns = adv.gae(rewards, values, torch.tensor(lengths), gamma, lam)
    expected = flat(
        [
            naive_gae(r, v, gamma, lam)
            for r, v in zip(per_row(rewards, lengths), per_row(values, lengths), strict=True)
        ]
    )
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)
    to_go = [
        [sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        for row in per_row(rewards, lengths)
    ]
    torch.testing.assert_close(
        adv.returns_to_go(rewards, torch.tensor(lengths), gamma), flat(to_go)
    )


def test_gae_is_fast():
    lengths = torch.full((1024,), 1024)
    rewards, values = torch.randn(1024 * 1024), torch.randn(1024 * 1024)
    start = time.process_time()
    adv.gae(rewards, values, lengths, 1.0, 0.95)
    assert time.process_time() - start < 3.0, (
        "a loop over tokens would take far longer; usually 0.1 s"
    )


def test_whitening():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    std = statistics.pstdev(values.tolist())
    torch.testing.assert_close(adv.whiten(values), (values - 3) / std)
    torch.testing.assert_close(adv.whiten(values, shift_mean=False), (values - 3) / std + 3)
    masked = adv.whiten(values, mask=torch.tensor([True, True, True, False]))
    torch.testing.assert_close(masked, torch.tensor([-1.0, 0.0, 1.0, 0.0]) / math.sqrt(2 / 3))
    assert adv.whiten(torch.tensor([5.0])).tolist() == [0.0]
    assert adv.whiten(torch.zeros(0)).shape == (0,)


UID = torch.tensor([7, 3, 7, 7, 9, 3])
SCORES = torch.tensor([1.0, 2.0, 0.0, 5.0, 4.0, 2.0])
LENGTHS = torch.tensor([2, 1, 0, 1, 2, 1])


def on_tokens(rows: list[float]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(rows, dtype=torch.float32), LENGTHS)


def test_grpo_by_hand():
    # Group 7 has scores 1, 0, 5: mean 2, Bessel's variance (1 + 4 + 9) / 2 = 7. Group 3 is
    # constant, group 9 alone.
    std = math.sqrt(7)
    torch.testing.assert_close(
        adv.grpo(SCORES, UID, LENGTHS), on_tokens([-1 / std, 0, -2 / std, 3 / std, 0, 0])
    )
    torch.testing.assert_close(
        adv.grpo(SCORES, UID, LENGTHS, scale_by_std=False), on_tokens([-1, 0, -2, 3, 0, 0])
    )


def test_equal_scores_give_no_advantage_even_where_float32_rounds():
    scores = torch.full((3,), 0.1)
    assert (
        adv.grpo(scores, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
        .abs()
        .max()
        < 1e-6
    )


def test_rloo_leaves_one_out():
    torch.testing.assert_close(
        adv.rloo(SCORES, UID, LENGTHS), on_tokens([1 - 2.5, 0, 0 - 3.0, 5 - 0.5, 0, 0])
    )


def test_opo_weighs_the_baseline_with_lengths():
    # Group 7: (2*1 + 0*0 + 1*5) / 3; group 3: 2; group 9: 4.
    baseline = 7 / 3
    torch.testing.assert_close(
        adv.opo(SCORES, UID, LENGTHS), on_tokens([1 - baseline, 0, -baseline, 5 - baseline, 0, 0])
    )


@settings(deadline=None, max_examples=12)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-3, 3)), min_size=1, max_size=10
    )
)
def test_group_baselines_are_the_naive_ones(rows: list[tuple[int, int, int]]):
    uid, lengths, scores = (list(column) for column in zip(*rows, strict=True))
    grpo, rloo, opo = [], [], []
    for i, (group, _, score) in enumerate(rows):
        members = [j for j in range(len(rows)) if uid[j] == group]
        members_scores = [scores[j] for j in members]
        deviation = statistics.stdev(members_scores) if len(members) > 1 else 0.0
        grpo.append((score - statistics.fmean(members_scores)) / (deviation + 1e-6))
        others = [scores[j] for j in members if j != i]
        rloo.append(score - statistics.fmean(others) if others else 0.0)
        weight = sum(lengths[j] for j in members)
        opo.append(score - sum(lengths[j] * scores[j] for j in members) / weight if weight else 0.0)
    arguments = (
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(uid),
        torch.tensor(lengths),
    )
    for function, expected in ((adv.grpo, grpo), (adv.rloo, rloo), (adv.opo, opo)):
        spread = torch.repeat_interleave(
            torch.tensor(expected, dtype=torch.float64), torch.tensor(lengths)
        )
        torch.testing.assert_close(function(*arguments), spread, msg=function.__name__)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 6))
def test_pass_at_k_enumerates_subsets(correct: list[bool], k: int):
    k = min(k, len(correct))
    subsets = list(itertools.combinations(range(len(correct)), k))
    rewards = [float(any(correct[i] for i in subset)) for subset in subsets]
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = []
    for i in range(len(correct)):
        group_advantages = [
            (r - mean) / deviation if deviation else 0.0
            for s, r in zip(subsets, rewards, strict=True)
            if i in s
        ]
        expected.append(statistics.fmean(group_advantages))
    ones = torch.ones(len(correct), dtype=torch.int64)
    result = adv.pass_at_k(torch.tensor(correct), ones * 5, ones, k)
    torch.testing.assert_close(
        result.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6
    )


def test_pass_at_k_by_hand():
    # One of four correct, k = 2: R = 1/2, s = 1/2; correct (1/2)/(1/2); wrong: 1/2 - C(2,1)/C(3,1)
    # = -1/6, over 1/2.
    result = adv.pass_at_k(
        torch.tensor([True, False, False, False]),
        torch.zeros(4, dtype=torch.int64),
        torch.ones(4, dtype=torch.int64),
        2,
    )
    torch.testing.assert_close(result, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    with pytest.raises(ValueError, match="k is 3"):
        adv.pass_at_k(
            torch.tensor([True, False]),
            torch.zeros(2, dtype=torch.int64),
            torch.ones(2, dtype=torch.int64),
            3,
        )


def test_reinforce_plus_plus():
    rewards = torch.tensor([-0.5, 1.0, 2.0])
    advantages, returns = adv.reinforce_plus_plus(rewards, torch.tensor([2, 1]))
    assert returns.tolist() == [0.5, 1.0, 2.0]
    torch.testing.assert_close(advantages, (returns - 3.5 / 3) / statistics.pstdev([0.5, 1.0, 2.0]))
    centred = [-1.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0]  # on_tokens of score - group mean
    expected = (torch.tensor(centred) - statistics.fmean(centred)) / statistics.pstdev(centred)
    torch.testing.assert_close(adv.reinforce_plus_plus_baseline(SCORES, UID, LENGTHS), expected)


def test_remax_subtracts_the_greedy_score():
    rewards = torch.tensor([-0.5, 1.0, 2.0])
    advantages, returns = adv.remax(rewards, torch.tensor([0.25, 1.0]), torch.tensor([2, 1]))
    assert advantages.tolist() == [0.25, 0.75, 1.0]
    assert returns.tolist() == [0.5, 1.0, 2.0]


def test_safe_rlhf_combination():
    combined = adv.safe_rlhf(torch.tensor([3.0, 1.0]), torch.tensor([1.0, -1.0]), multiplier=2.0)
    torch.testing.assert_close(combined, torch.tensor([1 / 3, 1.0]))


def test_covariance_selection():
    advantages = torch.tensor([0.0, 0.0, 0.0, 4.0, -4.0])
    log_probs = torch.tensor([-2.0, -2.0, -2.0, 0.0, -1.5])  # mean -1.5; covariances 0, 0, 0, 6, 0
    assert select_for_kl_cov(advantages, log_probs, fraction=0.2).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert int(select_for_kl_cov(advantages, log_probs, fraction=0.4).sum()) == 2
    chosen = select_for_clip_cov(advantages, log_probs, fraction=1.0, low=1.0, high=7.0, seed=0)
    assert chosen.tolist() == [False, False, False, True, False]
    assert not select_for_clip_cov(
        advantages, log_probs, fraction=1.0, low=1.0, high=5.0, seed=0
    ).any()
    many, ones = torch.tensor([1.0, -1.0] * 50), torch.tensor([0.0, -3.0] * 50)
    assert int(select_for_clip_cov(many, ones, fraction=0.1, seed=3).sum()) == 10
    assert torch.equal(
        select_for_clip_cov(many, ones, fraction=0.1, seed=3),
        select_for_clip_cov(many, ones, fraction=0.1, seed=3),
    )
    assert select_for_kl_cov(torch.zeros(0), torch.zeros(0)).shape == (0,)
