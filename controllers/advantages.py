"""Advantages: the factors of the policy loss, computed from rewards. Pure functions that run on the
controller.

Tensors are flat over response tokens [scored_tokens], rows (= samples) one after the other, with
`lengths` int64 [rows], 0 allowed. `uid`, int64 [rows], is equal for samples of one prompt; a group
may have any size and lie anywhere. Every function sees the whole batch, so means are over all its
tokens or rows, whatever the ranks. Statistics are taken in float64: with scores that are equal but
not representable, float32 noise divided by a zero deviation would become an advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.losses.segments import row_of_token

STD_EPSILON = 1e-6
"""Added to a group's standard deviation: verl's; TRL adds 1e-4, OpenRLHF 1e-9."""


def gae(
    token_rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [scored_tokens] each, not whitened (Schulman et al. 2016, eq. 16; the
    value after the end is 0).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    A response cut at the length limit ends like any other (as in TRL, verl, OpenRLHF): nothing is
    bootstrapped from its end.
    """
    ends = torch.cumsum(lengths, 0) - 1
    next_values = torch.cat([values[1:], values.new_zeros(1)])[: len(values)]
    next_values[ends[lengths > 0]] = 0.0
    advantages = _discounted_sum(token_rewards + gamma * next_values - values, lengths, gamma * lam)
    return advantages, advantages + values


def returns_to_go(token_rewards: Tensor, lengths: Tensor, gamma: float = 1.0) -> Tensor:
    """[scored_tokens]: sum over s >= t of gamma^(s-t) r_s inside the row."""
    return _discounted_sum(token_rewards, lengths, gamma)


def whiten(values: Tensor, *, shift_mean: bool = True, mask: Tensor | None = None) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8), [scored_tokens]; with shift_mean=False the mean
    stays.

    Over all tokens of the whole batch (of those in `mask`, if given; the others become 0), and
    without Bessel's correction: one token then has variance 0 and no special case. verl and TRL's
    PPO use Bessel's correction, OpenRLHF does not; TRL whitens inside every rank, so that its
    result depends on their number.
    """
    counted = values.double()
    if mask is not None:
        counted = counted[mask]
    if counted.numel() == 0:
        return torch.zeros_like(values)
    mean = counted.mean()
    scale = torch.rsqrt(counted.var(correction=0) + 1e-8)
    whitened = (values.double() - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    whitened = whitened.to(values.dtype)
    if mask is None:
        return whitened
    return whitened * mask


def grpo(scores: Tensor, uid: Tensor, lengths: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """(score - mean of the group) / (std of the group + 1e-6) on every token (DeepSeekMath, section
    4.1.2); scores: [rows].

    scale_by_std=False is Dr.GRPO's, which keeps hard and easy prompts at their weight. The
    deviation has Bessel's correction, as in verl, TRL and OpenRLHF (the paper does not say). A
    group of equal scores gets 0, and so does a group of one, which has nothing to compare with
    (verl: its raw score).
    """
    centred, group, size = _centred(scores, uid)
    if scale_by_std:
        variance = _group_sum(centred.square(), group, len(size)) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_EPSILON)[group]
    return _on_tokens(centred, scores, lengths)


def rloo(scores: Tensor, uid: Tensor, lengths: Tensor) -> Tensor:
    """score - mean score of the *other* samples of the group, on every token (Kool et al. 2019;
    Ahmadian et al. 2024).

    Equals n/(n-1) times Dr.GRPO's. A group of one gets 0 (verl: its raw score; OpenRLHF divides by
    zero).
    """
    centred, group, size = _centred(scores, uid)
    return _on_tokens(centred * (size / (size - 1).clamp(min=1))[group], scores, lengths)


def opo(scores: Tensor, uid: Tensor, lengths: Tensor) -> Tensor:
    """score - length-weighted mean score of the group, on every token: the variance-optimal
    baseline if gradients grow with the square root of the length (Hao et al. 2025, "On-policy RL
    with optimal reward baseline").

    A group of one gets 0 (verl: its raw score). Rows without tokens carry no weight.
    """
    group, size = _groups(uid)
    weight = lengths.double()
    total = _group_sum(weight, group, len(size)).clamp(min=1)
    baseline = _group_sum(weight * scores.double(), group, len(size)) / total
    return _on_tokens(scores.double() - baseline[group], scores, lengths)


def pass_at_k(correct: Tensor, uid: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The advantage of a sample when groups of k, of which one correct suffices, are what is
    rewarded, averaged over all subsets of k of the prompt's n samples (Chen et al. 2025, "Pass@k
    training", analytical derivation).

    With m wrong of n, mean R = 1 - C(m,k)/C(n,k), deviation s = sqrt(R (1-R)): correct samples get
    (1-R)/s, wrong ones (1 - R - C(m-1,k-1)/C(n-1,k-1))/s; 0 if every subset is rewarded alike.
    correct: bool [rows]. verl's grpo_passk is another method (best minus second best, for the best
    alone).
    """
    group, size = _groups(uid)
    if k < 1 or bool((size < k).any()):
        raise ValueError(
            f"pass@k: k is {k}, group sizes are {size.long().tolist()[:16]}; choose 1 <= k <= the "
            "smallest group"
        )
    right = correct.bool()
    wrong = _group_sum((~right).double(), group, len(size))
    mean = 1 - _subset_fraction(wrong, size, k)
    deviation = (mean * (1 - mean)).sqrt()
    all_wrong = _subset_fraction(wrong - 1, size - 1, k - 1)
    advantage = (1 - mean)[group] - torch.where(right, 0.0, all_wrong[group])
    advantage = torch.where(
        deviation[group] > 1e-9, advantage / deviation[group].clamp(min=1e-9), 0.0
    )
    return _on_tokens(advantage, torch.zeros((), dtype=torch.float32), lengths)


def reinforce_plus_plus(
    token_rewards: Tensor, lengths: Tensor, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns): returns-to-go of rewards that hold the KL, whitened over the whole
    batch (Hu et al. 2025).

    verl whitens with Bessel's correction, OpenRLHF (its authors') without, as here.
    """
    returns = returns_to_go(token_rewards, lengths, gamma)
    return whiten(returns), returns


def reinforce_plus_plus_baseline(scores: Tensor, uid: Tensor, lengths: Tensor) -> Tensor:
    """score - mean of the group on every token, then whitened over all tokens of the batch (Hu et
    al. 2025, with baseline); its KL belongs into the loss (k2).
    """
    centred, _, _ = _centred(scores, uid)
    return whiten(_on_tokens(centred, scores, lengths))


def remax(token_rewards: Tensor, baseline_scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages, returns): returns-to-go minus the score of the prompt's greedy response (Li et
    al. 2024, algorithm 1).

    baseline_scores: [rows]. Without KL every token gets score - greedy score.
    """
    returns = returns_to_go(token_rewards, lengths)
    return returns - torch.repeat_interleave(baseline_scores.to(returns.dtype), lengths), returns


def safe_rlhf(reward_advantages: Tensor, cost_advantages: Tensor, multiplier: float) -> Tensor:
    """(A_reward - lambda A_cost) / (1 + lambda) per token (Dai et al. 2024, Safe-RLHF): the
    division keeps the step's size as lambda grows. Whiten the result, or neither; whitening both
    parts first would undo lambda's units.
    """
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)


def _discounted_sum(values: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount y_{t+1} inside every row: a scan over time, all rows at once, on a
    padded time-major copy."""
    if values.numel() == 0:
        return values.clone()
    row = row_of_token(lengths)
    time = torch.arange(len(values)) - (torch.cumsum(lengths, 0) - lengths)[row]
    position = time * len(lengths) + row
    padded = values.new_zeros(int(lengths.max()), len(lengths))
    padded.view(-1)[position] = values
    steps = padded.unbind(0)
    for step in range(len(steps) - 2, -1, -1):
        steps[step].add_(steps[step + 1], alpha=discount)
    return padded.view(-1)[position]


def _groups(uid: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [rows] number of each row's group, float64 [groups] its size)."""
    _, group, size = torch.unique(uid, return_inverse=True, return_counts=True)
    return group, size.double()


def _group_sum(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add(0, group, values)


def _centred(scores: Tensor, uid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores minus the mean of their group in float64 [rows], group [rows], sizes [groups])."""
    group, size = _groups(uid)
    mean = _group_sum(scores.double(), group, len(size)) / size
    return scores.double() - mean[group], group, size


def _on_tokens(per_row: Tensor, like: Tensor, lengths: Tensor) -> Tensor:
    return torch.repeat_interleave(per_row.to(like.dtype), lengths)


def _subset_fraction(part: Tensor, whole: Tensor, size: int) -> Tensor:
    """C(part, size) / C(whole, size), 0 where part < size: the share of subsets that lie inside
    `part`."""
    fraction = torch.ones_like(whole)
    for i in range(size):
        fraction = fraction * (part - i).clamp(min=0) / (whole - i)
    return fraction
