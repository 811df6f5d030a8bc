"""The actor's loss: a policy loss by name, corrected for the rollout, minus the entropy bonus, plus
the KL to the reference.

Reads per-token columns advantages and weights; old_log_probs, ref_log_probs, rollout_log_probs
where present or asked for, and what the loss says that it reads. LossMetrics: policy_loss, entropy,
kl and kl_loss, clip fractions, ratios, approximate KL to the old policy, and the gap to the
rollout. Leaves out how advantages and weights are made.
"""

from __future__ import annotations

from torch import Tensor

from workers.engines.base import LossFn, Outputs
from workers.losses.checked import call_loss, check_metric_names
from workers.losses.config import Correction, PolicyLossConfig
from workers.losses.kl import MAX_LOG_RATIO, KLEstimator, kl_estimate
from workers.losses.reduction import Counted, LossMetrics, column, maximum, minimum, required
from workers.losses.rollout_correction import gap_metrics, importance_weights
from workers.losses.surrogates import PolicyTokens, surrogate
from workers.sequences import Sequences


def policy_loss(config: PolicyLossConfig) -> LossFn:
    """The loss that `config` describes:

        columns = weight_columns(lengths, counts, config.aggregation, constant=config.aggregation_constant)
        sequences = sequences.with_columns(per_token=columns)
        engine.train_step(sequences, policy_loss(config), entropy=config.entropy_coefficient != 0)

    First-step rule: without a column old_log_probs the old policy is the current one, detached. The
    ratio is then exactly 1, which is right for the first update of a batch and saves a forward
    pass.
    """
    loss_of_tokens = surrogate(config.name)

    def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
        counted = Counted.of(sequences)
        log_probs = counted.take(required(outputs.log_probs, "log_probs"))
        old_log_probs = _optional(counted, sequences, "old_log_probs")
        if old_log_probs is None:
            old_log_probs = log_probs.detach()
        tokens = PolicyTokens(
            log_probs=log_probs,
            log_ratio=(log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO),
            advantages=counted.take(column(sequences, "advantages")),
            row=counted.row,
            num_rows=counted.num_rows,
            columns={
                name: counted.take(column(sequences, name)) for name in loss_of_tokens.columns
            },
        )
        losses, per_token_metrics = call_loss(loss_of_tokens, tokens, config)
        metrics: LossMetrics = {}
        factors, rollout_metrics = _rollout(counted, sequences, old_log_probs, config)
        loss = counted.weighted_sum(losses if factors is None else factors * losses)
        metrics |= {
            "policy_loss": loss.detach(),
            **_ratio_metrics(counted, log_probs, old_log_probs),
            **rollout_metrics,
        }
        for term, term_metrics in (
            _entropy(counted, outputs, config),
            _kl(counted, log_probs, sequences, config),
        ):
            loss = loss if term is None else loss + term
            metrics |= term_metrics
        check_metric_names(per_token_metrics, metrics, config)
        for name, values in per_token_metrics.items():
            metrics[name] = counted.mean(values)
        return loss, metrics

    return loss_fn


def _rollout(
    counted: Counted, sequences: Sequences, old_log_probs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor | None, LossMetrics]:
    """Factors of the losses (None: no correction) and the metrics of the gap."""
    corrects = config.rollout_correction.correction is not Correction.none
    if not corrects and "rollout_log_probs" not in sequences.per_token:
        return None, {}
    rollout_log_probs = counted.take(column(sequences, "rollout_log_probs"))
    metrics = gap_metrics(counted, old_log_probs, rollout_log_probs)
    if not corrects:
        return None, metrics
    factors, ratio_metrics = importance_weights(
        counted, old_log_probs, rollout_log_probs, config.rollout_correction
    )
    return factors, metrics | ratio_metrics


def _ratio_metrics(counted: Counted, log_probs: Tensor, old_log_probs: Tensor) -> LossMetrics:
    """Metrics of the token ratio pi / pi_old, whatever the loss makes of it, and of the approximate
    KL(old || current) over samples of the old policy."""
    log_ratio = (log_probs - old_log_probs).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "ratio_mean": counted.mean(ratio),
        "ratio_max": maximum(ratio),
        "ratio_min": minimum(ratio),
        "log_ratio_clamped_fraction": counted.mean(log_ratio.abs() > MAX_LOG_RATIO),
        "approx_kl_k1": counted.mean(-log_ratio),
        "approx_kl_k3": counted.mean(
            kl_estimate(-log_ratio, log_ratio.new_zeros(()), KLEstimator.k3)
        ),
    }


def _entropy(
    counted: Counted, outputs: Outputs, config: PolicyLossConfig
) -> tuple[Tensor | None, LossMetrics]:
    """The entropy bonus, aggregated as the policy loss is."""
    if config.entropy_coefficient == 0 and outputs.entropy is None:
        return None, {}
    entropy = counted.take(required(outputs.entropy, "entropy"))
    term = (
        -config.entropy_coefficient * counted.weighted_sum(entropy)
        if config.entropy_coefficient
        else None
    )
    return term, {"entropy": counted.mean(entropy)}


def _kl(
    counted: Counted, log_probs: Tensor, sequences: Sequences, config: PolicyLossConfig
) -> tuple[Tensor | None, LossMetrics]:
    """The KL to the reference, aggregated as the policy loss is (GRPO, eq. 3); kl is a mean over
    tokens, before the coefficient.

    The estimate is not weighted with the ratio, so it is exact for the first update of a batch only
    (as in verl, OpenRLHF, and TRL by default).
    """
    if config.kl_coefficient == 0 and "ref_log_probs" not in sequences.per_token:
        return None, {}
    kl = kl_estimate(
        log_probs, counted.take(column(sequences, "ref_log_probs")), config.kl_estimator
    )
    metrics = {"kl": counted.mean(kl)}
    if config.kl_coefficient == 0:
        return None, metrics
    term = config.kl_coefficient * counted.weighted_sum(kl)
    return term, metrics | {"kl_loss": term.detach()}


def _optional(counted: Counted, sequences: Sequences, name: str) -> Tensor | None:
    return counted.take(sequences.per_token[name]) if name in sequences.per_token else None
