"""Policy losses of a package of its own, for test_optional_columns.py."""

from __future__ import annotations

from torch import Tensor

from workers.losses.config import PolicyLossConfig
from workers.losses.surrogates import PolicyTokens, reads


@reads(columns=("rollout_log_probs",))
def against_the_rollout(
    tokens: PolicyTokens, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The ratio to the policy as the generation engine computed it, in place of the old one."""
    log_ratio = tokens.log_probs - tokens.columns["rollout_log_probs"]
    return -log_ratio.exp() * tokens.advantages, {"rollout_ratio_mean": log_ratio.detach().exp()}


@reads(columns=("ref_log_probs",))
def against_the_reference(
    tokens: PolicyTokens, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient; the log ratio to the reference is measured alone."""
    log_ratio = tokens.log_probs.detach() - tokens.columns["ref_log_probs"]
    return -tokens.advantages * tokens.log_probs, {"reference_log_ratio_mean": log_ratio}
