"""The paper's costs of the transition from training to generation (HybridFlow, table 2;
docs/paper.md section 3), as fractions of the model's bytes.

They are for a training layout p-t-d and generation sizes pg-tg, and count norms as if they were
split like matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class TransitionCost:
    """The cost for one rank, in units of the model's bytes."""

    received: Fraction
    """Bytes received."""
    peak: Fraction
    """Most parameter memory."""
    redundant: Fraction
    """Training weights kept beside the generation weights."""


def deepspeed_chat(*, pp: int, tp: int, dp: int) -> TransitionCost:
    """Every rank gathers everything from everyone."""
    ranks = pp * tp * dp
    return TransitionCost(
        received=Fraction(ranks - 1, ranks), peak=Fraction(1), redundant=Fraction(1, ranks)
    )


def hybridflow_v(*, pp: int, tp: int) -> TransitionCost:
    """Every rank gathers the model inside its training model-parallel group and keeps its
    generation part."""
    return TransitionCost(
        received=Fraction(tp * pp - 1, tp * pp), peak=Fraction(1), redundant=Fraction(1, tp * pp)
    )


def hybridflow(*, pp: int, tp: int, generation_pp: int, generation_tp: int) -> TransitionCost:
    """Zero-redundancy grouping: every rank gathers inside its micro-DP group; its training
    shard is part of its generation shard."""
    parallel, generation = tp * pp, generation_tp * generation_pp
    return TransitionCost(
        received=Fraction(parallel - generation, generation * parallel),
        peak=Fraction(1, generation),
        redundant=Fraction(0),
    )
