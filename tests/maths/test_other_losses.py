"""Value, language-model, distillation and preference losses against hand-computed numbers and
naive loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from tests.maths.samples import make_pairs, make_sequences, run_parts, run_whole
from workers.engines.base import Outputs
from workers.losses.config import DPOLossConfig, PolicyLossConfig, ValueLossConfig
from workers.losses.language import distillation_loss, language_loss, with_pretraining
from workers.losses.policy import policy_loss
from workers.losses.preference import bradley_terry_loss, cost_model_loss, dpo_loss, pair_columns
from workers.losses.reduction import derived_metrics
from workers.losses.value import value_loss
from workers.sequences import Sequences

LENGTHS = [3, 0, 5, 1, 4]


def test_value_loss_by_hand():
    # Old values 0, returns 1: v = 0.5 is clipped to 0.2 (error 0.8); v = 0.1 is free; v = -0.5 is
    # free, since its error is larger.
    values = torch.tensor([0.5, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    sequences = Sequences(
        token_ids=torch.zeros(4, dtype=torch.int64),
        lengths=torch.tensor([4]),
        scored_lengths=torch.tensor([3]),
        per_token={
            "returns": torch.ones(3),
            "values": torch.zeros(3),
            "weights": torch.full((3,), 1 / 3, dtype=torch.float64),
        },
    )
    loss, metrics = value_loss(ValueLossConfig(clip=0.2))(Outputs(values=values), sequences)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81 + 2.25) / 3)
    torch.testing.assert_close(
        values.grad, torch.tensor([0.0, -0.9, -1.5], dtype=torch.float64) / 3
    )
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
    unclipped, _ = value_loss(ValueLossConfig(clip=0.0))(Outputs(values=values), sequences)
    assert unclipped.item() == pytest.approx(0.5 * (0.25 + 0.81 + 2.25) / 3)


def test_value_loss_equals_the_naive_loop_and_so_does_explained_variance():
    sequences = make_sequences(LENGTHS, 4)
    loss, metrics, (_, _, gradient, _) = run_parts(
        value_loss(ValueLossConfig(clip=0.3)), sequences, [[0, 3], [2], [1], [4]]
    )
    returns, old = sequences.per_token["returns"].tolist(), sequences.per_token["values"].tolist()
    leaf = (sequences.per_token["returns"] * 0.7 + 0.2).clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(len(returns)):
        clipped = old[t] + min(max(leaf[t].item() - old[t], -0.3), 0.3)
        free_error, clipped_error = (leaf[t] - returns[t]) ** 2, (clipped - returns[t]) ** 2
        moved = abs(leaf[t].item() - old[t]) > 0.3
        expected = expected + 0.5 * (
            clipped_error if moved and clipped_error > free_error.item() else free_error
        ) / len(returns)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-7, rtol=1e-6)
    errors = [r - v for r, v in zip(returns, leaf.tolist(), strict=True)]
    explained = derived_metrics({name: value.item() for name, value in metrics.items()})[
        "explained_variance"
    ]
    assert explained == pytest.approx(
        1 - statistics.pvariance(errors) / statistics.pvariance(returns), abs=1e-6
    )


def test_explained_variance_of_constant_returns_is_undefined():
    numbers = {
        "return_mean": 2.0,
        "return_squared": 4.0,
        "value_error": 0.0,
        "value_error_squared": 1.0,
    }
    assert math.isnan(derived_metrics(numbers)["explained_variance"])


def test_language_loss_is_cross_entropy():
    sequences = make_sequences([3, 2])
    logits = torch.randn(5, 11, dtype=torch.float64)
    targets = torch.tensor([1, 5, 0, 10, 3])
    log_probs = logits.log_softmax(-1)[torch.arange(5), targets].requires_grad_()
    loss, metrics = language_loss(Outputs(log_probs=log_probs), sequences)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert derived_metrics({"nll": metrics["nll"].item()})["perplexity"] == pytest.approx(
        math.exp(loss.item())
    )


def test_distillation_gradient_is_that_of_the_reverse_kl():
    """Exact expectation over a vocabulary of 6: one token per row, weighted with its
    probability."""
    logits = torch.randn(
        6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    teacher = torch.randn(
        6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).log_softmax(0)
    log_probs = logits.log_softmax(0)
    ones = torch.ones(6, dtype=torch.int64)
    sequences = Sequences(
        token_ids=torch.zeros(12, dtype=torch.int64),
        lengths=ones * 2,
        scored_lengths=ones,
        per_token={"teacher_log_probs": teacher, "weights": log_probs.exp().detach()},
    )
    loss, metrics = distillation_loss(Outputs(log_probs=log_probs), sequences)
    divergence = (log_probs.exp() * (log_probs - teacher)).sum()
    torch.testing.assert_close(loss, divergence)
    torch.testing.assert_close(metrics["reverse_kl"], divergence.detach())
    gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(divergence, logits)[0])


def test_pretraining_mix_adds_two_losses():
    sequences = make_sequences(LENGTHS, 5)
    pretrain = torch.tensor([False, True, True, False, True])
    mixed = sequences.with_columns(per_row={"pretrain": pretrain})
    policy = policy_loss(PolicyLossConfig(entropy_coefficient=0.1))
    loss, metrics, gradients = run_parts(with_pretraining(policy, 0.5), mixed, [[0, 1], [2, 3, 4]])
    policy_part, policy_metrics, policy_gradients = run_parts(policy, sequences, [[0, 3]])
    language_part, language_metrics, language_gradients = run_parts(
        language_loss, sequences, [[1, 2, 4]]
    )
    torch.testing.assert_close(loss, policy_part + 0.5 * language_part)
    for mine, first, second in zip(gradients, policy_gradients, language_gradients, strict=True):
        torch.testing.assert_close(mine, first + 0.5 * second)
    torch.testing.assert_close(metrics["ratio_max"], policy_metrics["ratio_max"])
    torch.testing.assert_close(metrics["pretrain_nll"], language_metrics["nll"])


def test_bradley_terry_by_hand():
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    sequences = make_pairs([1, 1, 1, 1])
    loss, metrics = bradley_terry_loss(Outputs(scores=scores), sequences)
    loss.backward()
    expected = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(3.0))) / 2
    assert loss.item() == pytest.approx(expected)
    slope = [-1 / (1 + math.exp(1.0)) / 2, -1 / (1 + math.exp(-3.0)) / 2]
    torch.testing.assert_close(
        scores.grad, torch.tensor([slope[0], -slope[0], slope[1], -slope[1]], dtype=torch.float64)
    )
    assert metrics["preference_accuracy"].item() == pytest.approx(0.5)
    assert metrics["margin"].item() == pytest.approx(-1.0)


def test_pairs_are_found_in_any_order_and_must_be_whole():
    sequences = make_pairs([2, 1, 3, 0, 1, 2], 3)
    for loss_fn in (bradley_terry_loss, cost_model_loss, dpo_loss(DPOLossConfig())):
        whole = run_whole(loss_fn, sequences)
        shuffled = run_parts(loss_fn, sequences, [[5, 2, 4, 3], [1, 0], []])
        torch.testing.assert_close(shuffled, whole)
        with pytest.raises(ValueError, match="both rows of a pair"):
            run_parts(loss_fn, sequences, [[0, 1, 2], [3, 4, 5]])
        with pytest.raises(ValueError, match="both rows of a pair"):
            run_parts(loss_fn, sequences, [[0, 3], [1, 2], [4, 5]])


def test_cost_model_loss_by_hand():
    scores = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    sequences = make_pairs([1, 1]).with_columns(per_row={"harm_sign": torch.tensor([1.0, 1.0])})
    loss, metrics = cost_model_loss(Outputs(scores=scores), sequences)
    expected = (
        math.log(1 + math.exp(-3.0)) + math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(1.0))
    )
    assert loss.item() == pytest.approx(expected)
    assert metrics["sign_accuracy"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_the_naive_loop(smoothing: float):
    lengths = [2, 3, 1, 4]
    sequences = make_pairs(lengths, 7)
    loss, metrics, (gradient, *_) = run_whole(
        dpo_loss(DPOLossConfig(beta=0.3, label_smoothing=smoothing)), sequences
    )
    leaf = sequences.per_token["current"].clone().requires_grad_()
    rows, references = leaf.split(lengths), sequences.per_token["ref_log_probs"].split(lengths)
    expected = torch.zeros((), dtype=torch.float64)
    for i in (0, 2):
        margin = 0.3 * (
            (rows[i].sum() - references[i].sum()) - (rows[i + 1].sum() - references[i + 1].sum())
        )
        expected = (
            expected
            + (1 - smoothing) * torch.log(1 + torch.exp(-margin)) / 2
            + smoothing * torch.log(1 + torch.exp(margin)) / 2
        )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, leaf.grad)
    assert metrics["margin"].item() == pytest.approx(
        (metrics["chosen_score"] - metrics["rejected_score"]).item()
    )


def test_pair_columns():
    columns = pair_columns(2)
    assert columns["pair"].tolist() == [0, 0, 1, 1]
    assert columns["chosen"].tolist() == [True, False, True, False]
    assert columns["weights"].tolist() == [0.5] * 4
