"""Holds a policy loss, which may be another package's, to its contract: PolicyLossFunction.

call_loss checks what every call returns; check_metric_names keeps a loss from replacing a metric of
ours. recipes/trial.py calls a loss on made-up tokens before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from hybridflow.wording import kind_of
from workers.losses.config import PolicyLossConfig
from workers.losses.surrogates import PolicyLoss, PolicyTokens

ENGINE_METRICS = ("loss", "grad_norm", "learning_rate")
"""TrainingEngine.train_step adds these to what the loss measured."""
ACTOR_METRICS = ("weight_version", "consistency_violations", "critic_warmup_steps")
"""ActorWorker.update_actor adds these."""


def call_loss(
    loss: PolicyLoss, tokens: PolicyTokens, config: PolicyLossConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The losses and metrics of `tokens`, each [tokens]; a ValueError that names actor.loss.name
    where the function returns anything else, or losses without a gradient."""
    result: object = loss(tokens, config)
    wanted = tokens.log_probs.shape
    if not isinstance(result, tuple) or len(result) != 2:
        raise _refused(config, f"returns {_kind(result)}, not the pair (losses, metrics)")
    losses, metrics = result
    if not isinstance(losses, Tensor) or losses.shape != wanted:
        raise _refused(
            config,
            f"returns {_kind(losses)} as losses for {len(tokens.log_probs)} tokens: one for each "
            "token is needed, which the caller weighs and sums",
        )
    if tokens.log_probs.requires_grad and not losses.requires_grad:
        raise _refused(
            config, "returns losses without a gradient; compute them from tokens.log_probs"
        )
    if not isinstance(metrics, Mapping):
        raise _refused(config, f"returns {_kind(metrics)} as metrics, not a dict")
    for name, values in metrics.items():
        if not isinstance(values, Tensor) or values.shape != wanted:
            raise _refused(
                config,
                f"returns {_kind(values)} as metric {name!r} of {len(tokens.log_probs)} tokens: a "
                "tensor with a number for each token is needed, of which the mean is logged",
            )
        if name.endswith(("_max", "_min")):
            raise _refused(
                config,
                f"has a metric {name!r}, but a loss's metrics are means over tokens; choose a name "
                "that does not end in _max or _min",
            )
    return losses, metrics


def check_metric_names(
    names: Iterable[str], taken: Iterable[str], config: PolicyLossConfig
) -> None:
    """A ValueError for a name of the loss's metrics that is in `taken` or what else the actor
    reports."""
    clashing = set(names) & {*taken, *ENGINE_METRICS, *ACTOR_METRICS}
    if clashing:
        raise _refused(
            config,
            f"has a metric {', '.join(map(repr, sorted(clashing)))}, which every policy loss "
            "reports; choose another name",
        )


def _refused(config: PolicyLossConfig, problem: str) -> ValueError:
    return ValueError(
        f"actor.loss.name is {config.name!r}, which {problem} (wanted: losses [tokens] with a "
        "gradient, and a dict of metrics, each [tokens]: docs/recipes.md)"
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return kind_of(value)
