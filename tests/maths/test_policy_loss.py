"""The policy loss: numbers by hand, values and gradients against the naive loop, the first-step
rule, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from tests.maths.naive import naive_policy_loss
from tests.maths.samples import make_sequences, run_whole
from workers.engines.base import Outputs
from workers.losses.aggregation import Aggregation
from workers.losses.config import (
    Correction,
    CorrectionLevel,
    DPOLossConfig,
    PolicyLossConfig,
    RolloutCorrectionConfig,
    ValueLossConfig,
)
from workers.losses.kl import KLEstimator
from workers.losses.policy import policy_loss
from workers.losses.reduction import derived_metrics
from workers.losses.surrogates import POLICY_LOSSES
from workers.sequences import Sequences

LENGTHS = [3, 0, 5, 1, 4]


def one_row(ratios: list[float], advantages: list[float]) -> tuple[torch.Tensor, Sequences]:
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    sequences = Sequences(
        token_ids=torch.zeros(len(ratios) + 1, dtype=torch.int64),
        lengths=torch.tensor([len(ratios) + 1]),
        scored_lengths=torch.tensor([len(ratios)]),
        per_token={
            "advantages": torch.tensor(advantages, dtype=torch.float64),
            "old_log_probs": old,
            "weights": torch.full((len(ratios),), 1 / len(ratios), dtype=torch.float64),
        },
    )
    return (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_(), sequences


def test_ppo_clip_by_hand():
    # Ratios 1.5 and 0.5 with both signs, then 4 with a negative advantage for the dual clip at 3.
    log_probs, sequences = one_row([1.5, 0.5, 1.5, 0.5, 4.0], [1.0, 1.0, -1.0, -1.0, -2.0])
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    loss, metrics = policy_loss(config)(Outputs(log_probs=log_probs), sequences)
    loss.backward()
    assert loss.item() == pytest.approx((-1.3 - 0.5 + 1.5 + 0.8 + 6.0) / 5)
    assert log_probs.grad is not None
    torch.testing.assert_close(
        log_probs.grad, torch.tensor([0, -0.5, 1.5, 0, 0], dtype=torch.float64) / 5
    )
    assert metrics["clip_fraction_high"].item() == pytest.approx(1 / 5)
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 5)
    assert metrics["dual_clip_fraction"].item() == pytest.approx(1 / 5)
    assert metrics["ratio_mean"].item() == pytest.approx(8 / 5)
    assert metrics["ratio_max"].item() == pytest.approx(4.0)
    assert metrics["ratio_min"].item() == pytest.approx(0.5)
    logs = [math.log(ratio) for ratio in (1.5, 0.5, 1.5, 0.5, 4.0)]
    assert metrics["approx_kl_k1"].item() == pytest.approx(-sum(logs) / 5)
    assert metrics["approx_kl_k3"].item() == pytest.approx((8 - 5 - sum(logs)) / 5)


def test_gspo_by_hand():
    # One row with ratios 2 and 0.5: the sequence ratio is 1, so nothing is clipped although both
    # tokens are far out.
    log_probs, sequences = one_row([2.0, 0.5], [1.0, 1.0])
    loss, metrics = policy_loss(PolicyLossConfig(name="gspo", clip_low=3e-4, clip_high=4e-4))(
        Outputs(log_probs=log_probs), sequences
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.0)
    torch.testing.assert_close(log_probs.grad, torch.tensor([-0.5, -0.5], dtype=torch.float64))
    assert metrics["clip_fraction_high"].item() == 0


def test_gspo_gradient_is_that_of_the_sequence_objective():
    """With one advantage a row and seq_mean_token_mean: -min(s A, clip(s) A), s the geometric
    mean of ratios, mean over rows."""
    sequences = make_sequences(LENGTHS, 1, Aggregation.seq_mean_token_mean)
    advantages = torch.repeat_interleave(
        torch.tensor([1.0, 0.0, -2.0, 0.5, -1.0], dtype=torch.float64), sequences.scored_lengths
    )
    sequences = sequences.with_columns(per_token={"advantages": advantages})
    loss, _, gradients = run_whole(
        policy_loss(PolicyLossConfig(name="gspo", clip_low=0.05, clip_high=0.05)), sequences
    )
    log_probs = sequences.per_token["current"].clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    for row, old, advantage in zip(
        log_probs.split(LENGTHS),
        sequences.per_token["old_log_probs"].split(LENGTHS),
        advantages.split(LENGTHS),
        strict=True,
    ):
        if len(row):
            s = (row - old).mean().exp()
            objective = (
                objective - torch.minimum(s * advantage[0], s.clamp(0.95, 1.05) * advantage[0]) / 4
            )
    objective.backward()
    torch.testing.assert_close(loss, objective.detach(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(gradients[0], log_probs.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_value_and_gradient_equal_the_naive_loop(name: str, aggregation: Aggregation):
    config = PolicyLossConfig(
        name=name,
        clip_low=0.1,
        clip_high=0.15,
        dual_clip=1.2,
        aggregation=aggregation,
        aggregation_constant=7,
    )
    corrections = [
        RolloutCorrectionConfig(),
        *(
            RolloutCorrectionConfig(
                correction=correction, level=level, min_ratio=0.7, max_ratio=1.4
            )
            for correction in (Correction.truncate, Correction.mask)
            for level in CorrectionLevel
        ),
    ]
    for seed, correction in enumerate(corrections):
        estimator = list(KLEstimator)[seed % 4]
        config = replace(
            config,
            rollout_correction=correction,
            entropy_coefficient=0.03,
            kl_coefficient=0.2,
            kl_estimator=estimator,
        )
        sequences = make_sequences(LENGTHS, seed, aggregation)
        loss, _, (log_probs_grad, entropy_grad, _, _) = run_whole(policy_loss(config), sequences)
        log_probs = sequences.per_token["current"].clone().requires_grad_()
        entropy = (log_probs.detach().abs() + 0.5).requires_grad_()
        expected = naive_policy_loss(config, sequences, log_probs, entropy)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(log_probs_grad, log_probs.grad, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(entropy_grad, entropy.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo", "policy_gradient"])
def test_first_step_rule(name: str):
    sequences = make_sequences(LENGTHS)
    del sequences.per_token["old_log_probs"]
    _, metrics, (gradient, *_) = run_whole(policy_loss(PolicyLossConfig(name=name)), sequences)
    assert metrics["ratio_max"].item() == metrics["ratio_min"].item() == 1.0
    assert metrics["approx_kl_k1"].item() == metrics["approx_kl_k3"].item() == 0.0
    # At ratio 1 every one of these losses has the gradient of REINFORCE.
    expected = -sequences.per_token["weights"] * sequences.per_token["advantages"]
    torch.testing.assert_close(gradient, expected)


def test_rollout_metrics_by_hand():
    log_probs, sequences = one_row([1.0, 1.0], [1.0, 1.0])
    rollout = sequences.per_token["old_log_probs"] - torch.tensor(
        [math.log(4.0), math.log(0.5)], dtype=torch.float64
    )
    sequences = sequences.with_columns(per_token={"rollout_log_probs": rollout})
    correction = RolloutCorrectionConfig(correction=Correction.truncate, max_ratio=2.0)
    loss, metrics = policy_loss(PolicyLossConfig(rollout_correction=correction))(
        Outputs(log_probs=log_probs), sequences
    )
    assert loss.item() == pytest.approx(-(2.0 + 0.5) / 2)
    assert metrics["log_prob_gap_max"].item() == pytest.approx(math.log(4.0))
    assert metrics["log_prob_gap_mean"].item() == pytest.approx((math.log(4.0) + math.log(2.0)) / 2)
    assert metrics["rollout_ratio_mean"].item() == pytest.approx(2.25)
    assert metrics["rollout_corrected_fraction"].item() == pytest.approx(0.5)
    numbers = {name: value.item() for name, value in metrics.items()}
    assert derived_metrics(numbers)["rollout_effective_sample_fraction"] == pytest.approx(
        4.5**2 / (2 * 16.25)
    )


def test_masked_tokens_do_not_exist():
    """A row with tokens masked out has the loss and the gradients of the row without them, even
    if they hold infinities."""
    mask = torch.tensor([True, False, True, True, False, False, True, True])
    masked = make_sequences([5, 3], 2, Aggregation.seq_mean_token_mean, mask)
    kept = Sequences(
        token_ids=torch.zeros(9, dtype=torch.int64),
        lengths=torch.tensor([5, 4]),
        scored_lengths=torch.tensor([3, 2]),
        per_token={name: values[mask] for name, values in masked.per_token.items()},
    )
    masked.per_token["old_log_probs"][~mask] = -math.inf
    masked.per_token["rollout_log_probs"][~mask] = -math.inf
    correction = RolloutCorrectionConfig(
        correction=Correction.mask, level=CorrectionLevel.sequence_mean
    )
    for name in ("ppo_clip", "gspo"):
        loss_fn = policy_loss(
            PolicyLossConfig(name=name, kl_coefficient=0.1, rollout_correction=correction)
        )
        loss, metrics, (gradient, *_) = run_whole(loss_fn, masked)
        expected_loss, expected_metrics, (expected_gradient, *_) = run_whole(loss_fn, kept)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(metrics, expected_metrics)
        torch.testing.assert_close(gradient[mask], expected_gradient)
        assert not gradient[~mask].any()


def test_an_exploded_ratio_stays_finite():
    _, sequences = one_row([1.0, 1.0, 1.0], [1.0, -1.0, 1.0])
    extreme = (
        (sequences.per_token["old_log_probs"] + torch.tensor([500.0, 500.0, -500.0]))
        .float()
        .requires_grad_()
    )
    loss, metrics = policy_loss(PolicyLossConfig())(Outputs(log_probs=extreme), sequences)
    loss.backward()
    assert (
        math.isfinite(loss.item())
        and extreme.grad is not None
        and torch.isfinite(extreme.grad).all()
    )
    assert metrics["log_ratio_clamped_fraction"].item() == pytest.approx(1.0)


def test_a_micro_batch_without_tokens_gives_zero_with_a_graph():
    sequences = make_sequences(LENGTHS)
    _, whole, _ = run_whole(policy_loss(PolicyLossConfig()), sequences)
    log_probs = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    outputs = Outputs(log_probs=log_probs, entropy=log_probs)
    for rows in ([1], []):
        loss, metrics = policy_loss(PolicyLossConfig())(
            outputs, sequences.rows(torch.tensor(rows, dtype=torch.int64))
        )
        loss.backward()
        assert loss.item() == 0.0
        assert metrics.keys() == whole.keys()
        assert metrics["ratio_max"].item() == -math.inf and metrics["ratio_mean"].item() == 0.0


def test_errors_name_the_field_and_the_fix():
    sequences = make_sequences([2])
    outputs = Outputs(log_probs=sequences.per_token["current"])
    with pytest.raises(ValueError, match="known: ppo_clip"):
        policy_loss(PolicyLossConfig(name="ppo"))
    with pytest.raises(ValueError, match="entropy=True"):
        policy_loss(PolicyLossConfig(entropy_coefficient=0.1))(outputs, sequences)
    for missing, config in {
        "advantages": PolicyLossConfig(),
        "weights": PolicyLossConfig(),
        "ref_log_probs": PolicyLossConfig(kl_coefficient=0.1),
        "covariance_selected": PolicyLossConfig(name="kl_cov"),
        "rollout_log_probs": PolicyLossConfig(
            rollout_correction=RolloutCorrectionConfig(correction=Correction.truncate)
        ),
    }.items():
        partial = make_sequences([2])
        del partial.per_token[missing]
        with pytest.raises(ValueError, match=missing):
            policy_loss(config)(outputs, partial)
    for arguments in (
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"dual_clip": 0.5},
        {"aggregation": Aggregation.constant},
    ):
        with pytest.raises(ValueError, match=r"choose|needs"):
            PolicyLossConfig(**arguments)


def test_configs_work_with_omegaconf():
    """Every config composes, enums parse by name, and the result is the dataclass."""
    node = OmegaConf.merge(
        OmegaConf.structured(PolicyLossConfig),
        {
            "aggregation": "seq_mean_token_mean",
            "kl_estimator": "k2",
            "rollout_correction": {"correction": "mask", "level": "sequence"},
        },
    )
    config = OmegaConf.to_object(node)
    assert config == PolicyLossConfig(
        aggregation=Aggregation.seq_mean_token_mean,
        kl_estimator=KLEstimator.k2,
        rollout_correction=RolloutCorrectionConfig(
            correction=Correction.mask, level=CorrectionLevel.sequence
        ),
    )
    assert OmegaConf.to_object(OmegaConf.structured(ValueLossConfig)) == ValueLossConfig()
    assert OmegaConf.to_object(OmegaConf.structured(DPOLossConfig)) == DPOLossConfig()
