"""The metrics of an update, from those of its optimizer steps."""

from __future__ import annotations

import math

from workers.mini_batches import mean_over_steps


def test_a_maximum_over_no_tokens_is_left_out() -> None:
    """Of a step in which nothing was sampled, and of an update of such steps alone; one that is
    infinite by its tokens stays."""
    empty = {"gap_max": -math.inf, "gap_min": math.inf, "loss": 0.0}
    full = {"gap_max": 0.5, "gap_min": -0.25, "loss": 1.0}
    assert dict(mean_over_steps([empty, full], "actor")) == {
        "actor/gap_max": 0.5,
        "actor/gap_min": -0.25,
        "actor/loss": 0.5,
    }
    assert dict(mean_over_steps([empty, empty], "actor")) == {"actor/loss": 0.0}
    broken = {"gap_max": math.inf, "gap_min": -math.inf, "loss": math.inf}
    assert dict(mean_over_steps([full, broken], "actor")) == {
        "actor/gap_max": math.inf,
        "actor/gap_min": -math.inf,
        "actor/loss": math.inf,
    }
