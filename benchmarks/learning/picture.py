"""The picture of benchmarks.learning: a panel per algorithm, with all the others' curves in
grey behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMNS = 5
COLOR, OTHERS = "#2a6f97", "#d9d9d9"


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy over the training step."""
    num_rows = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(2.5 * COLUMNS, 1.9 * num_rows + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for number, (axis, row) in enumerate(zip(grid.flat, rows, strict=False)):
        for other in rows:
            axis.plot(*_points(other), color=OTHERS, linewidth=0.8)
        steps, accuracies = _points(row)
        axis.plot(steps, accuracies, color=COLOR, linewidth=2)
        axis.set_title(row["algorithm"], loc="left", fontsize=8.5)
        change = f"{accuracies[0]:.0f} \N{RIGHTWARDS ARROW} {accuracies[-1]:.0f} %"
        axis.text(
            0.97,
            0.06,
            change,
            transform=axis.transAxes,
            ha="right",
            fontsize=9,
            fontweight="bold",
            color=COLOR,
        )
        axis.set_ylim(0, 104)
        axis.tick_params(labelsize=8, labelbottom=number + COLUMNS >= len(rows))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid.flat[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("held-out accuracy, greedy, %", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _points(row: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [step for step, _ in row["curve"]], [100 * accuracy for _, accuracy in row["curve"]]
