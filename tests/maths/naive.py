"""The policy loss as a loop over rows and tokens with Python's own if, for comparison. Torch
scalars, so that autograd gives gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.losses.aggregation import Aggregation
from workers.losses.config import Correction, CorrectionLevel, PolicyLossConfig
from workers.losses.kl import KLEstimator
from workers.sequences import Sequences


def naive_policy_loss(
    config: PolicyLossConfig, sequences: Sequences, log_probs: Tensor, entropy: Tensor
) -> Tensor:
    lengths = sequences.scored_lengths.tolist()
    columns = {name: values.split(lengths) for name, values in sequences.per_token.items()}
    filled = [length for length in lengths if length]
    total = torch.zeros((), dtype=torch.float64)
    for i, (row, row_entropy) in enumerate(
        zip(log_probs.split(lengths), entropy.split(lengths), strict=True)
    ):
        for t in range(len(row)):
            loss = _surrogate(config, row, {name: values[i] for name, values in columns.items()}, t)
            loss = loss * _correction(
                config, columns["old_log_probs"][i], columns["rollout_log_probs"][i], t
            )
            loss = loss - config.entropy_coefficient * row_entropy[t]
            loss = loss + config.kl_coefficient * _kl(
                config.kl_estimator, row[t] - columns["ref_log_probs"][i][t]
            )
            total = total + loss / _denominator(config, len(row), filled)
    return total


def _denominator(config: PolicyLossConfig, length: int, lengths: list[int]) -> int:
    match config.aggregation:
        case Aggregation.token_mean:
            return sum(lengths)
        case Aggregation.seq_mean_token_sum:
            return len(lengths)
        case Aggregation.seq_mean_token_mean:
            return len(lengths) * length
        case Aggregation.constant:
            return len(lengths) * config.aggregation_constant


def _surrogate(config: PolicyLossConfig, row: Tensor, columns: dict[str, Tensor], t: int) -> Tensor:
    advantage = columns["advantages"][t].item()
    ratio = torch.exp(row[t] - columns["old_log_probs"][t])
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.name == "policy_gradient":
        return -advantage * row[t]
    if config.name == "cispo":
        return -min(max(ratio.item(), low), high) * advantage * row[t]
    if config.name == "kl_cov":
        penalty = (
            (row[t] - columns["old_log_probs"][t]).abs()
            if columns["covariance_selected"][t]
            else 0.0
        )
        return -ratio * advantage + config.kl_cov_coefficient * penalty
    if config.name == "clip_cov" and columns["covariance_selected"][t]:
        return torch.zeros((), dtype=torch.float64)
    if config.name == "gspo":
        # The gradient of s = (prod ratio)^(1/n) reaches token t through its own log-prob times n,
        # because the sum over the n tokens of a row hands every token's log-prob 1/n of each.
        ratio = torch.exp((row - columns["old_log_probs"]).mean()).detach() * torch.exp(
            row[t] - row[t].detach()
        )
    if advantage >= 0:
        return -advantage * (
            ratio if ratio.item() < high else torch.tensor(high, dtype=torch.float64)
        )
    if config.name == "ppo_clip" and config.dual_clip and ratio.item() > config.dual_clip:
        return torch.tensor(-advantage * config.dual_clip, dtype=torch.float64)
    return -advantage * (ratio if ratio.item() > low else torch.tensor(low, dtype=torch.float64))


def _correction(config: PolicyLossConfig, old: Tensor, rollout: Tensor, t: int) -> float:
    settings = config.rollout_correction
    if settings.correction is Correction.none:
        return 1.0
    ratio = {
        CorrectionLevel.token: torch.exp(old[t] - rollout[t]),
        CorrectionLevel.sequence: torch.exp((old - rollout).sum()),
        CorrectionLevel.sequence_mean: torch.exp((old - rollout).mean()),
    }[settings.level].item()
    if settings.correction is Correction.truncate:
        return min(ratio, settings.max_ratio)
    return ratio if settings.min_ratio <= ratio <= settings.max_ratio else 0.0


def _kl(estimator: KLEstimator, difference: Tensor) -> Tensor:
    match estimator:
        case KLEstimator.k1:
            return difference
        case KLEstimator.abs:
            return difference if difference > 0 else -difference
        case KLEstimator.k2:
            return difference**2 / 2
        case KLEstimator.k3:
            return torch.exp(-difference) - 1 + difference
