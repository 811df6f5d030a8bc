"""Row: one measurement of benchmarks.scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A family in a layout with a feature, against one process with the plain model."""

    feature: str
    family: str
    layout: str
    loss_error: float
    """The largest error of a step's loss, relative to the largest loss."""
    grad_norm_error: float
    """The same of the gradient norm."""
    update_error: float
    """|change - reference change| / |reference change| over all trained weights, after the last
    step."""
    log_prob_gap: float
    """The largest difference of a token's log-probability."""
    sync_bytes: int
    """Bytes that the feature moves: those of a weight sync (lora, images), or those that a rank sends in
    one training step (cp), or those of the routes of its rows (experts)."""
    bound_bytes: int
    """The fewest that it has to move."""
    peak_bytes: int
    """The most bytes of a rank: of activations that the backward pass keeps (cp), of weights and
    optimizer states (lora, images)."""
    step_s: float
    """Seconds of a training step, the median of some."""
    time_ratio: float | None = None
    """Seconds with the feature over seconds without it, in the same run, where that is measured."""
