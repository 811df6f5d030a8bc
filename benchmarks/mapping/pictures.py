"""The pictures of docs/mapping.md that are not timelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.mapping.tables import alike

COLORS = {
    "llama-7b": "#4477aa",
    "llama-13b": "#228833",
    "llama-34b": "#cc6633",
    "llama-70b": "#aa3377",
}
PANELS_ACROSS = 5
PAPER_SEARCH_S = {8: 10, 16: 30, 24: 65, 32: 110, 48: 220, 64: 370, 96: 800, 128: 1400}
"""docs/paper.md section 4, read off a logarithmic plot."""


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted throughput over devices, a panel per algorithm, a line per model."""
    algorithms = [names[0] for names in alike(rows)]
    across = min(len(algorithms), PANELS_ACROSS)
    down = -(-len(algorithms) // across)
    figure = _figure(2.4 * across, 3.0 * down)
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(algorithms) :]:
        axis.set_visible(False)
    for axis, algorithm in zip(axes.flat, algorithms, strict=False):
        for model, color in COLORS.items():
            points = [
                (row["devices"], row["tokens_per_s"])
                for row in rows
                if (row["algorithm"], row["model"]) == (algorithm, model) and row["tokens_per_s"]
            ]
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3.5,
                linewidth=1.6,
                color=color,
                label=model,
            )
            first = points[0]
            axis.plot(
                [first[0], 1024],
                [first[1], first[1] * 1024 / first[0]],
                color=color,
                linewidth=0.7,
                linestyle=":",
            )
        axis.set(xscale="log", yscale="log", title=algorithm)
        axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axis.set_ylim(1e3, 4e5)
        axis.minorticks_off()
        _clean(axis)
    for row in axes:
        row[0].set_ylabel("tokens/s (dotted: linear)")
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def draw_search_times(ours: dict[int, float], path: Path) -> None:
    """Seconds of the search against the paper's, by devices."""
    figure = _figure(6, 3.2)
    axis = figure.subplots()
    axis.plot(
        list(PAPER_SEARCH_S),
        list(PAPER_SEARCH_S.values()),
        marker="s",
        markersize=4,
        color="#999999",
    )
    axis.plot(list(ours), list(ours.values()), marker="o", markersize=4, color="#cc6633")
    axis.text(128, 1400, "  paper", va="center", color="#666666")
    axis.text(128, ours[128], "  here", va="center", color="#cc6633")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="devices (7B to 70B, four models)",
        ylabel="search, seconds",
        xlim=(7, 200),
    )
    axis.set_xticks(list(PAPER_SEARCH_S), [str(size) for size in PAPER_SEARCH_S])
    axis.minorticks_off()
    _clean(axis)
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clean(axis) -> None:  # type: ignore[no-untyped-def]
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
