"""How per-token losses become one number: the weight of every token, from counts of the whole
global mini-batch.

loss = sum(weights * per_token_loss) over all micro-batches and ranks. Only the counts are global,
so the weights can be made anywhere and travel with the rows. Leaves out the losses themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Aggregation(StrEnum):
    """With N counted tokens, R rows that have at least one, and T_i counted tokens in row i, a
    token of row i weighs:

    Others differ in what is global: most average micro-batches or ranks, so that short ones weigh
    too much (the early GRPO of TRL and verl; verl's seq-mean modes long divided by the rows of a
    micro-batch). All modes are the same when all rows have one length.
    """

    token_mean = "token_mean"
    """1/N: every token alike (DAPO, section 3.3; PPO in OpenRLHF, TRL, verl)."""
    seq_mean_token_sum = "seq_mean_token_sum"
    """1/R: the policy gradient of whole responses (REINFORCE, RLOO)."""
    seq_mean_token_mean = "seq_mean_token_mean"
    """1/(R T_i): GRPO's paper, eq. 3, and GSPO, eq. 5; prefers short correct responses and long
    wrong ones.
   """
    constant = "constant"
    """1/(R L) with a constant L, the longest response allowed: Dr.GRPO. verl's
    seq-mean-token-sum-norm divides by L only, TRL's dr_grpo by rows x L as here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The numbers that weights need, of the whole mini-batch over all data ranks; + adds those
    of parts."""

    num_tokens: int
    """Counted tokens."""
    num_rows: int
    """Rows with at least one counted token; a row without any must not thin out the others."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            num_tokens=self.num_tokens + other.num_tokens, num_rows=self.num_rows + other.num_rows
        )


def count(lengths: Tensor) -> Counts:
    """Counts of rows with `lengths` (int64 [rows]) scored tokens."""
    return Counts(num_tokens=int(lengths.sum()), num_rows=int((lengths > 0).sum()))


def weight_columns(
    lengths: Tensor,
    counts: Counts,
    aggregation: Aggregation,
    *,
    constant: int = 0,
) -> dict[str, Tensor]:
    """The per-token columns that the losses read, float32 [scored_tokens] each:
    Sequences.with_columns(per_token=...).

    weights: of the loss. mean_weights: 1/N, so that metrics are means over tokens whatever the
    aggregation.

        >>> counts = Counts(num_tokens=4, num_rows=2)
        >>> weight_columns(tensor([1, 3]), counts, Aggregation.seq_mean_token_mean)["weights"]
        tensor([0.5000, 0.1667, 0.1667, 0.1667])

    lengths: int64 [rows], any part of the mini-batch. constant: Dr.GRPO's L, for
    Aggregation.constant only.
    """
    if aggregation is Aggregation.constant and constant < 1:
        raise ValueError(
            f"aggregation_constant is {constant}; aggregation 'constant' needs the longest "
            "response allowed, in tokens"
        )
    row_lengths = lengths.double()
    num_tokens, num_rows = max(counts.num_tokens, 1), max(counts.num_rows, 1)
    per_row = {
        Aggregation.token_mean: torch.full_like(row_lengths, 1 / num_tokens),
        Aggregation.seq_mean_token_sum: torch.full_like(row_lengths, 1 / num_rows),
        Aggregation.seq_mean_token_mean: 1 / (num_rows * row_lengths.clamp(min=1)),
        Aggregation.constant: torch.full_like(row_lengths, 1 / (num_rows * max(constant, 1))),
    }[aggregation]
    weights = torch.repeat_interleave(per_row, lengths).float()
    mean_weights = torch.full_like(weights, 1 / num_tokens)
    return {"weights": weights, "mean_weights": mean_weights}
