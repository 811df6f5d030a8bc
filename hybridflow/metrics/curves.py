"""Plots of a run's metrics from its JSONL file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridflow.metrics.jsonl import RESERVED, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2a6f97", "#d1495b", "#3a7d44", "#8a5a9e")
FEW = 30
"""Up to this many points are drawn as they are, with markers; more get a smoothed line in front
of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One panel.

    Curve(metric="accuracy", split="validation", label="held-out accuracy", percent=True)
    """

    metric: str
    split: str = "train"
    label: str = ""
    """Title of the panel; the metric's name when empty."""
    percent: bool = False
    """Values are fractions, drawn from 0 to 100 %."""


def draw_curves(jsonl: Path, png: Path, curves: Sequence[Curve], *, title: str = "") -> None:
    """One panel per curve over the training step, side by side; first and last value stand
    beside the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_jsonl(jsonl)
    figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, curve, color in zip(axes, curves, COLORS * len(curves), strict=False):
        steps, values = [], []
        for row in rows:
            if row["split"] == curve.split and curve.metric in row:
                steps.append(row["step"])
                values.append(row[curve.metric])
        if not steps:
            raise ValueError(
                f"curve: {jsonl} has no {curve.split}/{curve.metric}; it has "
                f"{', '.join(_known(rows))}"
            )
        _draw(axis, curve, steps, values, color)
    if title:
        figure.suptitle(title, fontweight="bold", fontsize=12)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=160)


def _known(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every split/metric of the rows."""
    known = set()
    for row in rows:
        for name in row:
            if name not in RESERVED:
                known.add(f"{row['split']}/{name}")
    return sorted(known)


def _draw(axis: Axes, curve: Curve, steps: list[int], values: list[float], color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    if curve.percent:
        values = [100 * value for value in values]
        axis.set_ylim(0, 104)
        axis.yaxis.set_major_formatter("{x:.0f} %")
    if len(values) <= FEW:
        axis.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4.5)
    else:
        axis.plot(steps, values, color=color, linewidth=1, alpha=0.3)
        axis.plot(steps, smooth(values), color=color, linewidth=2.2)
    shown = values if len(values) <= FEW else smooth(values)
    number = "{:.0f} %" if curve.percent else "{:.3g}"
    axis.set_title(
        f"{number} \N{RIGHTWARDS ARROW} {number}".format(shown[0], shown[-1]),
        loc="right",
        fontsize=11,
        color=color,
        fontweight="bold",
    )
    axis.set_title(curve.label or curve.metric, loc="left", fontsize=11)
    axis.set_xlabel("training step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], half_width: int = 4) -> list[float]:
    """Centred mean over up to 2 x half_width + 1 neighbours; symmetric, so that a rise is not
    drawn late."""
    smooth = []
    for index in range(len(values)):
        reach = min(half_width, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        smooth.append(sum(window) / len(window))
    return smooth
