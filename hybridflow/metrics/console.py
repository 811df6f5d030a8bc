"""The console: a live panel in a terminal, one line per step in a file or a job log.

Shows the latest step, and one sample whenever there are some; the record of a run are the JSONL
files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
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

from hybridflow import progress_display
from hybridflow.metrics.samples import Sample, SampleRows, shorten
from hybridflow.metrics.sinks import Row, Sink
from hybridflow.progress_display import Display

PHASE = "seconds/"
"""Metrics under this prefix are the phases of a step; seconds/step is all of it."""
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Points of a sparkline."""
PROMPT_CHARACTERS = 300
RESPONSE_CHARACTERS = 600
"""The console shows this much of a sample at most; samples.jsonl has all of it."""
FEWEST_CHARACTERS = 60
"""The console shows this much of each turn of an episode at least."""
ENVIRONMENT = "environment"


class ConsoleSink(Sink):
    """Live panel on a terminal, lines elsewhere."""

    def __init__(
        self,
        names: Sequence[str],
        total_steps: int,
        start_step: int,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(soft_wrap=True)
        self._names = list(names)
        self._total_steps = total_steps
        self._history: dict[str, list[float]] = {}
        self._latest: Row | None = None
        self._steps = max(0, start_step)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("steps", total=total_steps, completed=self._steps)
        self._display: Display | None = None

    def log(self, row: Row) -> None:
        if row.split != "train":
            self._print(_moment(row.split, row.step), row.metrics)
            return
        for name in self._names:
            if name in row.metrics:
                self._history.setdefault(name, []).append(row.metrics[name])
        self._latest, self._steps = row, row.step
        self._progress.update(self._task, completed=row.step)
        if not self._console.is_terminal:
            shown = {name: row.metrics[name] for name in self._names if name in row.metrics}
            self._print(f"step {row.step}/{self._total_steps}", shown)
            return
        if self._display is None:
            # Started with the first step: until then the start has its own line.
            progress_display.drawn_elsewhere(True)
            self._display = Display(console=self._console, get_renderable=self._panel)
            self._display.start()

    def show(self, rows: SampleRows) -> None:
        print_sample(self._console, rows.samples[0], f"sample of {_moment(rows.split, rows.step)}")

    def _print(self, title: str, metrics: Mapping[str, float]) -> None:
        parts = [title]
        for name, value in metrics.items():
            if not name.startswith(PHASE):
                parts.append(f"{name} {compact(value)}")
        if self._latest is not None and title.startswith("step"):
            parts.append(_phases(self._latest.metrics))
        self._console.print(" | ".join(filter(None, parts)), highlight=False, markup=False)

    def _panel(self) -> RenderableType:
        if self._latest is None:
            return ""
        table = Table.grid(padding=(0, 2))
        for name in self._names:
            if name in self._history:
                values = self._history[name]
                table.add_row(
                    Text(name, style="bold"),
                    Text(compact(values[-1]), justify="right"),
                    Text(sparkline(values), style="cyan"),
                )
        parts: list[RenderableType] = [
            self._progress,
            table,
            Text(_phases(self._latest.metrics), style="dim"),
        ]
        if self._display is not None:
            parts.append(progress_display.current_line())
        return Panel(Group(*parts), title="hybridflow", border_style="blue")

    def summary(self, values: Mapping[str, object]) -> None:
        self._stop_display()
        table = Table(title="summary", show_header=False, title_style="bold")
        for name, value in _flat(values):
            if value is None:  # a run without validation has no reward before and after
                continue
            table.add_row(name, compact(value) if isinstance(value, float) else str(value))
        self._console.print(table)

    def rewind(self, step: int, attempt: int) -> None:
        lost = self._steps - step
        for values in self._history.values():
            del values[max(0, len(values) - lost) :]
        self._steps = step
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        self._stop_display()

    def _stop_display(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
            progress_display.drawn_elsewhere(False)
            self._console.print(self._panel())


def _moment(split: str, step: int) -> str:
    return f"step {step}" if split == "train" else f"{split} after step {step}"


def print_sample(console: Console, sample: Sample, title: str) -> None:
    """A panel on a terminal, three lines elsewhere; long texts are shortened."""
    if console.is_terminal:
        console.print(_sample_panel(sample, title))
    else:
        console.print(
            "\n".join(_sample_lines(sample, title)), highlight=False, markup=False, soft_wrap=True
        )


def _sample_panel(sample: Sample, title: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(shorten(sample.prompt, PROMPT_CHARACTERS)))
    for name, text in _parts(sample):
        grid.add_row(name, Text(text, style="" if name == ENVIRONMENT else "bold"))
    return Panel(
        grid,
        title=title,
        title_align="left",
        subtitle=escape(_verdict(sample)),
        subtitle_align="left",
    )


def _sample_lines(sample: Sample, title: str) -> list[str]:
    """Three lines, whatever the texts contain; of an episode one more for each further turn."""
    prompt = shorten(sample.prompt, PROMPT_CHARACTERS).replace("\n", "\\n")
    lines = [f"{title} | {_verdict(sample)}", f"  prompt    {prompt}"]
    for name, text in _parts(sample):
        shown = text.replace("\n", "\\n")
        lines.append(f"  {name:<9} {shown}")
    return lines


def _parts(sample: Sample) -> list[tuple[str, str]]:
    """(role, text) of each turn of an episode; the response of any other sample."""
    if not sample.turns:
        return [("response", shorten(sample.response, RESPONSE_CHARACTERS))]
    most = max(RESPONSE_CHARACTERS // len(sample.turns), FEWEST_CHARACTERS)
    return [(str(turn["role"]), shorten(str(turn["text"]), most)) for turn in sample.turns]


def _verdict(sample: Sample) -> str:
    """reward 1 | reward/format 0.5 | finish stop | weights 12"""
    parts = [f"{name} {compact(value)}" for name, value in sample.scores.items()]
    parts.append(f"finish {sample.finish_reason}")
    if sample.weight_version >= 0:  # a run that trains nothing has one version only
        parts.append(f"weights {sample.weight_version}")
    return " | ".join(parts)


def compact(value: float) -> str:
    """Four significant digits, thousands with separators: 0.01234, 1.235, 12,346, nan."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or (value == int(value) and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def sparkline(values: Sequence[float]) -> str:
    """The last values as bars between their own minimum and maximum; ! where a value is not
    finite."""
    values = values[-WIDTH:]
    finite = list(filter(math.isfinite, values))
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    line = ""
    for value in values:
        line += SPARKS[round((value - low) * scale)] if math.isfinite(value) else "!"
    return line


def _phases(metrics: Mapping[str, float]) -> str:
    """8.1 s (generation 3, update 4.9)."""
    phases: dict[str, float] = {}
    for name, value in metrics.items():
        if name.startswith(PHASE):
            phases[name.removeprefix(PHASE)] = value
    total = phases.pop("step", sum(phases.values()))
    inner = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
    return (f"{total:.2f} s" + (f" ({inner})" if inner else "")) if phases or total else ""


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else [(prefix + name, value)]
        )
    return rows
