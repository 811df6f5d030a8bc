"""Every loss of the product and a batch with the columns that they read, for runs that share rows
over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.engines.threed_cases import VOCABULARY, loss_fn
from workers.engines.base import Head, LossFn
from workers.losses.aggregation import Aggregation, count, weight_columns
from workers.losses.config import DPOLossConfig, PolicyLossConfig, ValueLossConfig
from workers.losses.language import distillation_loss, language_loss, with_pretraining
from workers.losses.policy import policy_loss
from workers.losses.preference import (
    bradley_terry_loss,
    cost_model_loss,
    dpo_loss,
    pair_columns,
)
from workers.losses.value import value_loss
from workers.sequences import Sequences

LENGTHS = (97, 31, 12, 9, 9, 9, 5, 3, 2, 1)
"""The rows of 9 tokens are responses to one prompt."""
SCORED = (60, 13, 11, 3, 4, 5, 0, 1, 1, 0)


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and the head whose outputs it reads."""

    function: LossFn
    head: Head = Head.lm
    pairs: bool = False
    """Rows 2i and 2i + 1 belong together, on one data rank."""
    aggregation: Aggregation = Aggregation.token_mean


_PPO = policy_loss(PolicyLossConfig(entropy_coefficient=0.01, kl_coefficient=0.1))
LOSSES = {
    "ppo": Loss(_PPO),
    "gspo": Loss(
        policy_loss(PolicyLossConfig(name="gspo")), aggregation=Aggregation.seq_mean_token_mean
    ),
    "cispo": Loss(policy_loss(PolicyLossConfig(name="cispo"))),
    "ppo_ptx": Loss(with_pretraining(_PPO, 16.0)),
    "sft": Loss(language_loss),
    "distillation": Loss(distillation_loss),
    "dpo": Loss(dpo_loss(DPOLossConfig(beta=0.5)), pairs=True),
    "reward_model": Loss(bradley_terry_loss, Head.score, pairs=True),
    "cost_model": Loss(cost_model_loss, Head.score, pairs=True),
    "critic": Loss(value_loss(ValueLossConfig(clip=0.2)), Head.value),
}
NUMBERS = "numbers"
"""The loss of threed_cases.py, which depends on every number of the head."""


def loss_of(name: str) -> LossFn:
    return loss_fn if name == NUMBERS else LOSSES[name].function


def make_batch(num_rows: int, seed: int, loss: str) -> Sequences:
    """Ragged rows, three of which begin with one prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[:num_rows])
    scored = torch.tensor(SCORED[:num_rows])
    rows = [torch.randint(3, VOCABULARY, (size,), generator=generator) for size in lengths.tolist()]
    for row in range(4, min(6, num_rows)):
        rows[row][:4] = rows[3][:4]
    num_scored = int(scored.sum())

    def normal(size: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
        return mean + deviation * torch.randn(size, generator=generator)

    sequences = Sequences(
        token_ids=torch.cat(rows),
        lengths=lengths,
        scored_lengths=scored,
        per_token={"weights": normal(num_scored) / num_scored},
        per_row={"targets": normal(num_rows)},
    )
    if loss == NUMBERS:
        return sequences
    log_probs = {}
    for name in ("old_log_probs", "ref_log_probs", "teacher_log_probs"):
        log_probs[name] = normal(num_scored, -4.6, 0.3)
    weights = weight_columns(scored, count(scored), LOSSES[loss].aggregation)
    columns = {name: normal(num_scored) for name in ("advantages", "returns", "values")}
    per_row = {"pretrain": torch.arange(num_rows) % 3 == 0, "harm_sign": normal(num_rows).sign()}
    if LOSSES[loss].pairs:
        per_row |= pair_columns(num_rows // 2)
    return sequences.with_columns(per_token={**columns, **log_probs, **weights}, per_row=per_row)
