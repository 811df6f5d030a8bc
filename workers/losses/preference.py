"""Losses on pairs of rows, one preferred to the other: Bradley-Terry (reward and cost models) and
DPO.

Rows come with per-row columns pair (int64, the pair's number), chosen (bool) and weights (1 / pairs
of the whole mini-batch): pair_columns makes them for rows in the order chosen, rejected, chosen,
rejected, ... Both rows of a pair must be in the same micro-batch on the same rank; their order in
it does not matter. A pair that was cut apart is a ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.base import LossFn, Outputs
from workers.losses.config import DPOLossConfig
from workers.losses.reduction import LossMetrics, column, required, row_column
from workers.losses.segments import segment_sum
from workers.sequences import Sequences


def pair_columns(num_pairs: int) -> dict[str, Tensor]:
    """Per-row columns of a whole mini-batch of num_pairs pairs, rows in the order chosen,
    rejected, chosen, rejected, ..."""
    return {
        "pair": torch.arange(num_pairs).repeat_interleave(2),
        "chosen": torch.tensor([True, False]).repeat(num_pairs),
        "weights": torch.full((2 * num_pairs,), 1 / max(num_pairs, 1)),
    }


def bradley_terry_loss(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
    """-log sigmoid(s_chosen - s_rejected), one term a pair (InstructGPT, eq. 1).

    InstructGPT averages over the K(K-1)/2 pairs of a prompt first; here every pair weighs what its
    weight says. A tie is not counted as accurate. For a cost model the row with the *higher* cost
    is the chosen one.
    """
    scores = required(outputs.scores, "scores")
    chosen, rejected = _pairs(sequences)
    weights = row_column(sequences, "weights")[chosen]
    margin = scores[chosen] - scores[rejected]
    loss = (weights * -F.logsigmoid(margin)).sum()
    return loss, {
        "preference_loss": loss.detach(),
        **_pair_metrics(weights, scores[chosen], scores[rejected]),
    }


def cost_model_loss(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
    """Bradley-Terry on costs plus -log sigmoid(sign * cost) for both rows of each pair (Safe-RLHF,
    eq. 6), so that 0 separates safe from unsafe; per-row column harm_sign: +1 for an unsafe
    response, -1 for a safe one.
    """
    loss, metrics = bradley_terry_loss(outputs, sequences)
    scores, weights = required(outputs.scores, "scores"), row_column(sequences, "weights")
    signed = row_column(sequences, "harm_sign") * scores
    sign_loss = (weights * -F.logsigmoid(signed)).sum()
    accuracy = 0.5 * (weights * (signed > 0)).sum()
    return loss + sign_loss, metrics | {
        "sign_loss": sign_loss.detach(),
        "sign_accuracy": accuracy.detach(),
    }


def dpo_loss(config: DPOLossConfig) -> LossFn:
    """-log sigmoid(beta (log pi/ref of chosen - log pi/ref of rejected)), sums over scored tokens
    (Rafailov et al. 2023, eq. 7), with conservative labels (Mitchell 2023). Reads the per-token
    column ref_log_probs.

    TRL can divide by the length (its sigmoid_norm); the paper and we do not.
    """

    def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, LossMetrics]:
        log_probs = required(outputs.log_probs, "log_probs")
        row = sequences.row_of_token.to(log_probs.device)
        rewards = config.beta * segment_sum(
            log_probs - column(sequences, "ref_log_probs"), row, sequences.num_rows
        )
        chosen, rejected = _pairs(sequences)
        weights = row_column(sequences, "weights")[chosen]
        margin = rewards[chosen] - rewards[rejected]
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        loss = (weights * losses).sum()
        return loss, {
            "preference_loss": loss.detach(),
            **_pair_metrics(weights, rewards[chosen], rewards[rejected]),
        }

    return loss_fn


def _pairs(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """int64 [pairs] each: the micro-batch's rows that were chosen and, in the same order,
    rejected."""
    pair, is_chosen = row_column(sequences, "pair"), row_column(sequences, "chosen").bool()
    chosen, rejected = torch.nonzero(is_chosen).squeeze(1), torch.nonzero(~is_chosen).squeeze(1)
    chosen, rejected = chosen[torch.argsort(pair[chosen])], rejected[torch.argsort(pair[rejected])]
    if not torch.equal(pair[chosen], pair[rejected]):
        raise ValueError(
            f"preference loss: a micro-batch has chosen rows of pairs {pair[chosen].tolist()} and "
            f"rejected rows of pairs {pair[rejected].tolist()}; keep both rows of a pair in one "
            "micro-batch on one rank"
        )
    return chosen, rejected


def _pair_metrics(weights: Tensor, chosen: Tensor, rejected: Tensor) -> LossMetrics:
    """Means over pairs."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "preference_accuracy": (weights * (chosen > rejected)).sum(),
        "margin": (weights * (chosen - rejected)).sum(),
        "chosen_score": (weights * chosen).sum(),
        "rejected_score": (weights * rejected).sum(),
    }
