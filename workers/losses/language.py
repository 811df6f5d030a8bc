"""Losses of language modelling: cross-entropy (supervised fine-tuning, PPO-ptx' pretraining loss)
and on-policy distillation.

Read the per-token column weights; distillation also teacher_log_probs. Leaves out distillation over
the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.base import LossFn, Outputs
from workers.losses.kl import MAX_LOG_RATIO, KLEstimator, kl_estimate
from workers.losses.reduction import Counted, LossMetrics, column, required, row_column
from workers.sequences import Sequences


def language_loss(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
    """-log pi of the counted tokens; with token_mean over the global mini-batch the usual
    cross-entropy.

    Hugging Face's Trainer took the mean of micro-batches' means before its version 4.46; prompts
    count in pretraining, not in fine-tuning: that is up to scored_lengths and the weights' mask.
    """
    counted = Counted.of(sequences)
    nll = -counted.take(required(outputs.log_probs, "log_probs"))
    loss = counted.weighted_sum(nll)
    return loss, {"language_loss": loss.detach(), "nll": counted.mean(nll)}


def distillation_loss(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
    """Reverse KL to a teacher on the student's own samples: sg[log pi - log teacher] pi /
    sg[pi_old] per token.

    Its gradient is E[(log pi - log teacher) grad log pi] of every position by itself (no credit for
    later tokens: on-policy distillation as of Agarwal et al. 2024, GKD, with lambda = 1 and one
    sampled token in place of the sum over the vocabulary). log pi - log teacher itself would have
    gradient 0 in expectation. Its value is the k1 estimate where pi_old = pi, which holds without a
    column old_log_probs.
    """
    counted = Counted.of(sequences)
    log_probs = counted.take(required(outputs.log_probs, "log_probs"))
    teacher = counted.take(column(sequences, "teacher_log_probs"))
    old = (
        counted.take(sequences.per_token["old_log_probs"])
        if "old_log_probs" in sequences.per_token
        else log_probs.detach()
    )
    ratio = (log_probs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = counted.weighted_sum((log_probs - teacher).detach() * ratio)
    return loss, {
        "distillation_loss": loss.detach(),
        "reverse_kl": counted.mean(log_probs - teacher),
        "reverse_kl_k3": counted.mean(kl_estimate(log_probs, teacher, KLEstimator.k3)),
    }


def with_pretraining(policy: LossFn, coefficient: float) -> LossFn:
    """PPO-ptx (InstructGPT, eq. 2): `policy` on the rows whose per-row column pretrain is False,
    plus coefficient times the language loss on those where it is True, in one update.

    Weights are normalised for each kind of row by itself (two calls of weight_columns). The
    policy's columns need a value for pretraining tokens too; any will do. Safe-RLHF's own code and
    DeepSpeed-Chat make two optimizer steps instead, one for each loss.
    """

    def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
        pretrain = row_column(sequences, "pretrain").bool()
        loss, metrics = policy(*_rows(outputs, sequences, ~pretrain))
        language, language_metrics = language_loss(*_rows(outputs, sequences, pretrain))
        for name, value in language_metrics.items():
            metrics[f"pretrain_{name}"] = value
        return loss + coefficient * language, metrics

    return loss_fn


def _rows(outputs: Outputs, sequences: Sequences, chosen: Tensor) -> tuple[Outputs, Sequences]:
    """The rows where `chosen` (bool [rows]) holds; chunks of log_probs and entropy keep their
    graph."""
    chosen = chosen.to(sequences.scored_lengths.device)
    tokens = torch.repeat_interleave(chosen, sequences.scored_lengths)
    log_probs = required(outputs.log_probs, "log_probs")[tokens]
    entropy = None if outputs.entropy is None else outputs.entropy[tokens]
    return Outputs(log_probs=log_probs, entropy=entropy), sequences.rows(
        torch.nonzero(chosen).squeeze(1)
    )
