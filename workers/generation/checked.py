"""check_generations(): holds what a generation engine returned, which may be another package's, to
its contract: Generations. A few looks at numpy arrays for each call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.generation.base import Generations

FINISH_REASONS = ("stop", "length")


def check_generations(
    generated: Generations, num_rows: int, vocab_size: int, engine: str, limit: NDArray[np.int64]
) -> None:
    """A ValueError that names `engine` and the first thing that is wrong.

    `limit`: int64 [rows], the most tokens of every response.
    """
    lengths, ids = generated.lengths, generated.response_ids
    problem = ""
    if len(lengths) != num_rows or len(generated.finish_reasons) != num_rows:
        problem = (
            f"{len(lengths)} lengths and {len(generated.finish_reasons)} finish_reasons for "
            f"{num_rows} prompts"
        )
    elif ((lengths < 1) | (lengths > limit)).any():
        row = int(np.flatnonzero((lengths < 1) | (lengths > limit))[0])
        problem = f"{lengths[row]} tokens in row {row}, where 1 to {limit[row]} are allowed"
    elif len(ids) != int(lengths.sum()) or len(generated.log_probs) != len(ids):
        problem = (
            f"{len(ids)} response_ids and {len(generated.log_probs)} log_probs, where the lengths "
            f"add up to {int(lengths.sum())}"
        )
    elif ((ids < 0) | (ids >= vocab_size)).any():
        token = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        problem = f"token id {token}, outside the vocabulary 0..{vocab_size - 1}"
    elif not np.isfinite(generated.log_probs).all():
        problem = "a log_prob that is not finite"
    else:
        unknown = sorted(set(generated.finish_reasons) - set(FINISH_REASONS))
        if unknown:
            problem = f"finish_reason {unknown[0]!r}, which is neither stop nor length"
    if problem:
        raise ValueError(f"generation.engine {engine!r} returned {problem}")
