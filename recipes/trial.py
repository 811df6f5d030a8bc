"""try_policy_loss(): calls the run's policy loss before anything starts, on a few made-up tokens.

What a loss of another package returns is checked at every call (workers/losses/checked.py); a
mistake is found here first, without a model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybridflow.columns import COLUMNS
from workers.engines.base import Outputs
from workers.losses.aggregation import count, weight_columns
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.losses.surrogates import surrogate
from workers.sequences import Sequences

SCORED_LENGTHS = (3, 2)


def try_policy_loss(config: PolicyLossConfig) -> None:
    """A ValueError with actor.loss.name if the loss fails, or returns other things than a policy
    loss does. It gets two rows of three and two tokens, with every column that it may read."""
    outputs, sequences = _made_up_rows(config)
    log_probs = outputs.log_probs
    assert log_probs is not None
    # Without the terms that are added to it, a gradient can only come from the loss.
    alone = replace(config, kl_coefficient=0.0, entropy_coefficient=0.0)
    try:
        loss, _ = policy_loss(alone)(outputs, sequences)
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        # The function is somebody else's: whatever it raises, the run does not start.
        if isinstance(error, ValueError) and str(error).startswith("actor.loss.name"):
            raise
        raise ValueError(
            f"actor.loss.name is {config.name!r}, which fails on {len(log_probs)} made-up tokens "
            f"({type(error).__name__}: {error})"
        ) from error
    if log_probs.grad is None:
        raise ValueError(
            f"actor.loss.name is {config.name!r}, whose losses have no gradient with respect to "
            "tokens.log_probs; compute them from it, or from tokens.log_ratio"
        )


def depends_on_old_policy(config: PolicyLossConfig) -> bool:
    """Whether the gradient of the loss changes with the policy that its ratio is taken to."""
    gradients = []
    for shift in (0.0, 0.05):
        outputs, sequences = _made_up_rows(config)
        assert outputs.log_probs is not None
        old = sequences.per_token["old_log_probs"] + shift
        loss_fn = policy_loss(replace(config, kl_coefficient=0.0, entropy_coefficient=0.0))
        loss, _ = loss_fn(outputs, sequences.with_columns(per_token={"old_log_probs": old}))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(outputs.log_probs.grad)
    before, after = gradients
    assert before is not None and after is not None
    return not torch.equal(before, after)


def _made_up_rows(config: PolicyLossConfig) -> tuple[Outputs, Sequences]:
    """Rows with every column that a loss may read."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(SCORED_LENGTHS)
    old = -0.5 - torch.rand(sum(SCORED_LENGTHS), generator=generator)
    columns: dict[str, Tensor] = {}
    for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs"):
        columns[name] = old + 0.1 * torch.randn(len(old), generator=generator)
    for name in surrogate(config.name).columns:
        columns.setdefault(name, _made_up(name, len(old), generator))
    sequences = Sequences(
        token_ids=torch.zeros(int((lengths + 1).sum()), dtype=torch.int64),
        lengths=lengths + 1,
        scored_lengths=lengths,
        per_token={
            **columns,
            "advantages": torch.randn(len(old), generator=generator),
            **weight_columns(lengths, count(lengths), config.aggregation, constant=8),
        },
    )
    log_probs = old.clone().requires_grad_()
    return Outputs(log_probs=log_probs, entropy=(-log_probs).clone()), sequences


def _made_up(name: str, num_tokens: int, generator: torch.Generator) -> Tensor:
    """[tokens] of the declared dtype."""
    numbers = torch.randn(num_tokens, generator=generator)
    if name in COLUMNS and COLUMNS[name].dtype == "bool":
        return numbers > 0
    return numbers
