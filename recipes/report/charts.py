"""Line charts and timelines as inline SVG, coloured by the page's style sheet so that they follow a
light or a dark screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

from hybridflow.metrics.curves import FEW, smooth

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
"""Margins of the plot inside a chart."""
COLORS = 16
"""As many as a timeline tells apart; the style sheet names them c0, c1, ..."""
MOST_POINTS = 600
"""Longer series are thinned to the mean of equal stretches."""
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Series(label="validation", points=[(0, 0.2), (10, 0.6)], style="validation")"""

    label: str
    points: Sequence[Point]
    """(step, value); values that are not finite are drawn as crosses on the axis."""
    style: str = "train"
    """A class of the style sheet: train, validation, lost."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to places on the page, and the ticks between."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside the range, about so many."""
        raw = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def line_chart(series: Sequence[Series], *, description: str) -> Markup:
    """A chart of value over training step; empty where no series has a finite value."""
    steps, values = [], []
    for line in series:
        for step, value in line.points:
            steps.append(step)
            if math.isfinite(value):
                values.append(value)
    if not values:
        return Markup("")
    across = Axis(*_range(min(steps), max(steps), margin=0.0), LEFT, WIDTH - RIGHT)
    up = Axis(*_range(min(values), max(values), margin=0.06), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">'
    ]
    ticks = up.ticks(4)
    for tick, label in zip(ticks, labels(ticks), strict=True):
        y = up.place(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in across.ticks(5):
        if tick == round(tick):
            parts.append(
                f'<text class="tick" x="{across.place(tick):.1f}" y="{HEIGHT - 7}" '
                f'text-anchor="middle">{tick:.0f}</text>'
            )
    for line in series:
        parts += _line(line, across, up)
    parts.append("</svg>")
    return Markup("".join(parts))


def _line(line: Series, across: Axis, up: Axis) -> list[str]:
    """A series of few points with markers; of many, a smoothed line in front of them."""
    finite = [point for point in line.points if math.isfinite(point[1])]
    parts = []
    for step, value in line.points:
        if not math.isfinite(value):
            x = across.place(step)
            parts.append(
                f'<text class="cross" x="{x:.1f}" y="{HEIGHT - BOTTOM}" text-anchor="middle">'
                f"\N{MULTIPLICATION SIGN}<title>step {step:.0f}: {value}</title></text>"
            )
    if len(finite) > FEW:
        parts.append(_path(thinned(finite), across, up, f"{line.style} faint"))
        smoothed = smooth([value for _, value in finite])
        finite = thinned([(step, value) for (step, _), value in zip(finite, smoothed, strict=True)])
        parts.append(_path(finite, across, up, line.style))
        return parts
    parts.append(_path(finite, across, up, line.style))
    for step, value in finite:
        parts.append(
            f'<circle class="{line.style}" cx="{across.place(step):.1f}" cy="{up.place(value):.1f}" '
            f'r="2.6"><title>{escape(line.label)}, step {step:.0f}: {number(value)}</title></circle>'
        )
    return parts


def _path(points: Sequence[Point], across: Axis, up: Axis, style: str) -> str:
    places = " ".join(f"{across.place(step):.1f},{up.place(value):.1f}" for step, value in points)
    return f'<polyline class="{style}" points="{places}"/>'


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Not more than `most` points: the mean of equal stretches of them."""
    if len(points) <= most:
        return list(points)
    bounds = [round(index * len(points) / most) for index in range(most + 1)]
    result = []
    for first, last in pairwise(bounds):
        stretch = points[first:last]
        steps, values = zip(*stretch, strict=True)
        result.append((sum(steps) / len(stretch), sum(values) / len(stretch)))
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Something that a lane did: Slice(lane="main/0", name="actor.update_actor", start_s=0.2,
    end_s=1.4)"""

    lane: str
    name: str
    start_s: float
    end_s: float


def timeline(slices: Sequence[Slice], styles: Sequence[str], *, description: str) -> Markup:
    """Lanes over seconds, a box for every slice, coloured by the place of its name in `styles`."""
    if not slices:
        return Markup("")
    lanes = list(dict.fromkeys(part.lane for part in slices))
    width, row = 960, 22
    height = row * len(lanes) + 24
    begin = min(part.start_s for part in slices)
    span = Axis(0.0, max(part.end_s for part in slices) - begin or 1.0, 130, width - 10)
    parts = [
        f'<svg class="timeline" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(description)}">'
    ]
    for tick in span.ticks(8):
        x = span.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number(tick)} s</text>'
        )
    for index, lane in enumerate(lanes):
        parts.append(f'<text class="lane" x="0" y="{index * row + 15}">{escape(lane)}</text>')
    for part in slices:
        x, end = span.place(part.start_s - begin), span.place(part.end_s - begin)
        style = f"c{styles.index(part.name) % COLORS}" if part.name in styles else "other"
        parts.append(
            f'<rect class="{style}" x="{x:.1f}" y="{lanes.index(part.lane) * row + 3}" '
            f'width="{max(end - x, 0.8):.1f}" height="{row - 6}"><title>{escape(part.name)} on '
            f"{escape(part.lane)}: {number(part.end_s - part.start_s)} s</title></rect>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}" if math.isfinite(value) else str(value)
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text


def labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many digits as tell them apart."""
    texts = list(map(number, ticks))
    for digits in range(4, 13):
        if len(set(texts)) == len(texts):
            break
        texts = [f"{tick:.{digits}g}" for tick in ticks]
    return texts


def _range(low: float, high: float, *, margin: float) -> tuple[float, float]:
    """A range of some width around the values."""
    width = high - low or abs(high) or 1.0
    if low == high:
        return low - width / 2, high + width / 2
    return low - margin * width, high + margin * width
