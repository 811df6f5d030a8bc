"""The console: a live panel in a terminal, one line per step in a file or a job log.

Shows the latest step only; the record of a run is the JSONL file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hybridflow.metrics.sinks import Row, Sink

PHASE = "seconds/"
"""Metrics under this prefix are the phases of a step; seconds/step is all of it."""
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Points of a sparkline."""


class ConsoleSink(Sink):
    """Live panel on a terminal, lines elsewhere."""

    def __init__(
        self, names: Sequence[str], total_steps: int, start_step: int, console: Console | None = None
    ) -> None:
        self._console = console or Console(soft_wrap=True)
        self._names = list(names)
        self._total_steps = total_steps
        self._history: dict[str, list[float]] = {}
        self._latest: Row | None = None
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self._console, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total_steps, completed=start_step)
        self._live: Live | None = None

    def log(self, row: Row) -> None:
        if row.split != "train":
            self._print(f"{row.split} after step {row.step}", row.metrics)
            return
        for name in self._names:
            if name in row.metrics:
                self._history.setdefault(name, []).append(row.metrics[name])
        self._latest = row
        self._progress.update(self._task, completed=row.step)
        if not self._console.is_terminal:
            self._print(
                f"step {row.step}/{self._total_steps}",
                {name: row.metrics[name] for name in self._names if name in row.metrics},
            )
            return
        if self._live is None:
            # Started with the first step, so that what the start-up prints is not drawn over.
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        self._live.update(self._panel(row))

    def _print(self, title: str, metrics: Mapping[str, float]) -> None:
        parts = [
            title,
            *(f"{name} {compact(value)}" for name, value in metrics.items() if not name.startswith(PHASE)),
        ]
        if self._latest is not None and title.startswith("step"):
            parts.append(_phases(self._latest.metrics))
        self._console.print(" | ".join(part for part in parts if part), highlight=False, markup=False)

    def _panel(self, row: Row) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name in self._names:
            if name in self._history:
                values = self._history[name]
                table.add_row(
                    Text(name, style="bold"),
                    Text(compact(values[-1]), justify="right"),
                    Text(sparkline(values), style="cyan"),
                )
        phases = Text(_phases(row.metrics), style="dim")
        return Panel(Group(self._progress, table, phases), title="hybridflow", border_style="blue")

    def summary(self, values: Mapping[str, object]) -> None:
        self._stop_live()
        table = Table(title="summary", show_header=False, title_style="bold")
        for name, value in _flat(values):
            table.add_row(name, compact(value) if isinstance(value, float) else str(value))
        self._console.print(table)

    def close(self) -> None:
        self._stop_live()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._latest is not None:
                self._console.print(self._panel(self._latest))


def compact(value: float) -> str:
    """Four significant digits, thousands with separators: 0.01234, 1.235, 12,346, nan."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or (value == int(value) and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def sparkline(values: Sequence[float]) -> str:
    """The last values as bars between their own minimum and maximum; ! where a value is not finite."""
    values = values[-WIDTH:]
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values)


def _phases(metrics: Mapping[str, float]) -> str:
    """8.1 s (generation 3, update 4.9)."""
    phases = {name.removeprefix(PHASE): value for name, value in metrics.items() if name.startswith(PHASE)}
    total = phases.pop("step", sum(phases.values()))
    inner = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
    return (f"{total:.2f} s" + (f" ({inner})" if inner else "")) if phases or total else ""


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return rows
