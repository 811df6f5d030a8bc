"""Policy losses that break their contract, one each, for test_broken_losses.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.losses.config import PolicyLossConfig
from workers.losses.surrogates import PolicyTokens, reads


def reinforce(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * tokens.log_probs


@reads()
def scalar(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens).mean(), {}


@reads()
def no_pair(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens)


@reads()
def float_metric(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"mine": 0.5}


@reads()
def mean_metric(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"mine": tokens.advantages.mean()}


@reads()
def maximum_metric(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"mine_max": tokens.advantages}


@reads()
def no_gradient(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens).detach(), {}


@reads()
def other_gradient(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return -tokens.advantages * torch.ones(len(tokens.advantages), requires_grad=True), {}


@reads()
def clash(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"policy_loss": tokens.advantages}


@reads()
def gap_clash(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"log_prob_gap_mean": tokens.advantages}


@reads()
def engine_clash(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), {"grad_norm": tokens.advantages}


@reads()
def list_of_metrics(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return reinforce(tokens), [tokens.advantages]


@reads()
def raises(tokens: PolicyTokens, config: PolicyLossConfig) -> Any:
    return tokens.columns["surprise"], {}
