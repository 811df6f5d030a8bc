"""Rewards per token, KL estimators and coefficient, group filter, Lagrange multiplier."""

from __future__ import annotations

import json
import math

import pytest
import torch

from controllers.kl import KLCoefficient, KLControlConfig, KLEstimator, kl_estimate, sequence_kl
from controllers.lagrange import LagrangeConfig, LagrangeMultiplier
from controllers.rewards import groups_with_signal, overlong_penalty, token_rewards


def test_score_lands_on_the_last_token_and_kl_on_every_token():
    lengths = torch.tensor([2, 0, 1])
    log_probs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    rewards = token_rewards(
        torch.tensor([10.0, 20.0, 30.0]), lengths, log_probs, reference, kl_coefficient=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 10.1, 30.0]))
    assert token_rewards(torch.tensor([10.0, 20.0, 30.0]), lengths).tolist() == [0.0, 10.0, 30.0]
    with pytest.raises(ValueError, match="ref_log_probs are needed"):
        token_rewards(torch.tensor([1.0]), torch.tensor([1]), kl_coefficient=0.1)


def test_kl_estimators_by_hand():
    log_probs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # d = 0.5, -1
    expected = {
        KLEstimator.k1: [0.5, -1.0],
        KLEstimator.abs: [0.5, 1.0],
        KLEstimator.k2: [0.125, 0.5],
        KLEstimator.k3: [math.exp(-0.5) - 0.5, math.e - 2],
    }
    for estimator in KLEstimator:
        torch.testing.assert_close(
            kl_estimate(log_probs, reference, estimator), torch.tensor(expected[estimator])
        )


def test_estimators_against_the_exact_divergence():
    """Over a small vocabulary: k1 and k3 are unbiased, k2's gradient is that of the reverse KL,
    k3's of the forward KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    log_probs = logits.log_softmax(0)
    probabilities = log_probs.exp().detach()
    reverse = (log_probs.exp() * (log_probs - reference)).sum()
    forward = (reference.exp() * (reference - log_probs)).sum()

    def value(estimator: KLEstimator) -> torch.Tensor:
        return (probabilities * kl_estimate(log_probs, reference, estimator)).sum()

    def gradient(quantity: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(quantity, logits, retain_graph=True)[0]

    torch.testing.assert_close(value(KLEstimator.k1), reverse)
    torch.testing.assert_close(value(KLEstimator.k3), reverse)
    torch.testing.assert_close(
        gradient(value(KLEstimator.k1)), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(gradient(value(KLEstimator.k2)), gradient(reverse))
    torch.testing.assert_close(gradient(value(KLEstimator.k3)), gradient(forward))


def test_k3_stays_finite_and_exact_for_small_differences():
    assert torch.isfinite(
        kl_estimate(torch.tensor([-200.0]), torch.tensor([0.0]), KLEstimator.k3)
    ).all()
    small = kl_estimate(
        torch.tensor([1e-3], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        KLEstimator.k3,
    )
    assert small.item() == pytest.approx(5e-7, rel=1e-3)


def test_adaptive_coefficient():
    coefficient = KLCoefficient(KLControlConfig(coefficient=0.1, target=6.0, horizon=1000))
    coefficient.update(kl=12.0, num_rows=100)  # error 1, clipped to 0.2
    assert coefficient.value == pytest.approx(0.1 * 1.02)
    coefficient.update(kl=5.4, num_rows=100)  # error -0.1
    assert coefficient.value == pytest.approx(0.1 * 1.02 * 0.99)
    restored = KLCoefficient(KLControlConfig(coefficient=0.1, target=6.0, horizon=1000))
    restored.load_state_dict(json.loads(json.dumps(coefficient.state_dict())))
    assert restored.value == coefficient.value
    fixed = KLCoefficient(KLControlConfig(coefficient=0.3))
    fixed.update(kl=100.0, num_rows=10)
    assert fixed.value == 0.3
    with pytest.raises(ValueError, match="coefficient is 0"):
        KLControlConfig(target=6.0)


def test_sequence_kl_sums_over_rows():
    kl = sequence_kl(
        torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -4.0]), torch.tensor([2, 0, 1])
    )
    assert kl.tolist() == [-0.5, 0.0, 1.0]


def test_overlong_penalty():
    penalty = overlong_penalty(torch.tensor([0, 80, 85, 100, 130]), max_length=100, buffer=20)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, -0.25, -1.0, -1.0]))
    with pytest.raises(ValueError, match="overlong buffer"):
        overlong_penalty(torch.tensor([1]), max_length=10, buffer=0)


def test_groups_with_signal():
    scores = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.5, 7.0, -2.0])
    uid = torch.tensor([4, 8, 4, 6, 8, 9, 6])
    assert groups_with_signal(scores, uid).tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert groups_with_signal(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_lagrange_multiplier():
    multiplier = LagrangeMultiplier(
        LagrangeConfig(initial=1.0, learning_rate=0.1, threshold=1.0, maximum=2.0, window=3)
    )
    multiplier.update([3.0, 5.0])
    assert multiplier.value == pytest.approx(math.exp(0.1 * (4 - 1)))
    before = multiplier.value
    multiplier.update([-1.0, -2.0])  # the window keeps 5, -1, -2
    assert multiplier.mean_cost == pytest.approx(2 / 3)
    assert multiplier.value == pytest.approx(before * math.exp(0.1 * before * (2 / 3 - 1)))
    restored = LagrangeMultiplier(
        LagrangeConfig(initial=1.0, learning_rate=0.1, threshold=1.0, maximum=2.0, window=3)
    )
    restored.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    multiplier.update([100.0])
    restored.update([100.0])
    assert restored.value == multiplier.value == pytest.approx(2.0)
