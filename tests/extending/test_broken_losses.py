"""A policy loss of another package that breaks its contract is refused in one line that names the
setting: before the run, and at any call (issue 10, tried by a stranger, A)."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.python_settings import make_settings
from recipes.run import run
from recipes.trial import try_policy_loss
from tests.maths.samples import make_sequences, run_whole
from tests.tiny import tiny_grpo
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.losses.surrogates import POLICY_LOSSES

RETURNED = {
    "scalar": r"returns a tensor of shape \[\] as losses for \d+ tokens: one for each token",
    "no_pair": r"returns a tensor of shape \[\d+\], not the pair \(losses, metrics\)",
    "float_metric": "returns a float as metric 'mine'",
    "mean_metric": r"returns a tensor of shape \[\] as metric 'mine'",
    "maximum_metric": "has a metric 'mine_max', but a loss's metrics are means over tokens",
    "no_gradient": "returns losses without a gradient",
    "clash": "has a metric 'policy_loss', which every policy loss reports",
    "gap_clash": "has a metric 'log_prob_gap_mean'",
    "engine_clash": "has a metric 'grad_norm'",
    "list_of_metrics": "returns a list as metrics, not a dict",
}
TRIED = RETURNED | {
    "other_gradient": "no gradient with respect to tokens.log_probs",
    "raises": r"fails on 5 made-up tokens \(KeyError: 'surprise'\)",
}


def broken(name: str) -> PolicyLossConfig:
    return PolicyLossConfig(name=f"tests.extending.broken_losses:{name}")


@pytest.mark.parametrize("name", TRIED)
def test_the_trial_names_setting_and_fault(name: str) -> None:
    config = broken(name)
    with pytest.raises(ValueError, match=TRIED[name]) as raised:
        try_policy_loss(config)
    message = str(raised.value)
    assert message.startswith(f"actor.loss.name is {config.name!r}") and "\n" not in message


@pytest.mark.parametrize("name", RETURNED)
def test_so_does_every_call(name: str) -> None:
    with pytest.raises(ValueError, match=RETURNED[name]):
        run_whole(policy_loss(broken(name)), make_sequences([3, 1]))


@pytest.mark.parametrize("name", POLICY_LOSSES.builtin)
def test_the_built_in_losses_pass(name: str) -> None:
    """The trial refuses none of them, and neither does the check of every call."""
    try_policy_loss(PolicyLossConfig(name=name))
    loss, metrics, (gradient, *_) = run_whole(
        policy_loss(PolicyLossConfig(name=name)), make_sequences([3, 1])
    )
    assert loss.isfinite() and gradient.abs().sum() > 0 and "policy_loss" in metrics


def test_a_dry_run_refuses_it(tmp_path: Path) -> None:
    settings = {
        **tiny_grpo(tmp_path),
        "actor.loss.name": "tests.extending.broken_losses:scalar",
        "reward.function": "tests.tiny:by_length",
        "dry_run": True,
    }
    with pytest.raises(
        ValueError, match=r"actor\.loss\.name is 'tests.extending.broken_losses:scalar'"
    ):
        run(make_settings("grpo", settings))
