"""Shows what the controller is doing: as a moving line on a terminal, and elsewhere as a log
line once an outermost activity has outlasted its patience, then ever more rarely."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hybridflow.progress import Activity, activities, duration, nothing, told_of_ends

LOGGER = logging.getLogger(__name__)
TICK_S = 0.25
DETAIL_S = 2.0
"""Seconds between two looks at what host processes are doing."""
FLICKER_S = 0.5
"""Activities shorter than this do not appear on a terminal."""
BAR_WIDTH = 24
_REPORTER: Reporter | None = None


@contextmanager
def shown(console: Console | None = None, *, live: bool = True) -> Iterator[None]:
    """Shows this process' activities until the `with` block ends. Inside another `shown` it changes
    nothing.

    console: where the moving line is drawn if it is a terminal (default: stdout). live=False: log
    lines only.
    """
    global _REPORTER
    if _REPORTER is not None:
        yield
        return
    reporter = _REPORTER = Reporter(console or Console(), live=live)
    try:
        with told_of_ends(reporter.ended):
            yield
    finally:
        _REPORTER = None
        reporter.close()


def current_line() -> RenderableType:
    """The moving line, for a display of somebody else to draw; see `drawn_elsewhere`."""
    return _REPORTER.line() if _REPORTER is not None else ""


def drawn_elsewhere(elsewhere: bool) -> None:
    """Says that another display draws `current_line`: a terminal has room for one display at a
    time."""
    if _REPORTER is not None:
        _REPORTER.drawn_elsewhere(elsewhere)


class Reporter:
    """Looks at the activities four times a second, in a thread of its own."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._draws = live and console.is_terminal
        self._elsewhere = False
        self._display: Display | None = None
        self._spinner = Spinner("dots")
        self._detail, self._detail_at = "", 0.0
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hybridflow progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._clear()

    def drawn_elsewhere(self, elsewhere: bool) -> None:
        self._elsewhere = elsewhere
        self._clear()

    def ended(self, outermost: Activity) -> None:
        """Takes the line away and, if the activity took long, says what its time went into."""
        self._clear()
        if outermost.seconds < outermost.patience_s:
            return
        parts = []
        for what, seconds in outermost.parts.items():
            if seconds >= 0.1:
                parts.append(f"{what} {duration(seconds)}")
        LOGGER.info(
            "%s took %s%s",
            outermost.what,
            duration(outermost.seconds),
            f": {', '.join(parts)}" if parts else "",
        )

    def line(self) -> RenderableType:
        """start 12 s > building actor 4.1 s > loading the weights of X (3.2 s), with a bar
        where a total is known."""
        stack = activities()
        if not stack:
            return ""
        grid = Table.grid(padding=(0, 1))
        texts: list[RenderableType] = [self._spinner]
        for current in stack:
            texts += [Text(current.what), Text(duration(current.seconds), style="dim")]
            if current.total is not None:
                texts += [
                    ProgressBar(current.total, current.done, width=BAR_WIDTH),
                    Text(f"{current.done}/{current.total}"),
                ]
            texts.append(Text("\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}", style="dim"))
        detail = self._latest_detail(stack)
        texts = [*texts, Text(detail)] if detail else texts[:-1]
        grid.add_row(*texts)
        return grid

    def _run(self) -> None:
        while not self._closed.wait(TICK_S):
            stack = activities()
            if not stack:
                continue
            if not self._draws:
                self._log(stack)
            elif stack[0].seconds >= FLICKER_S:
                self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._elsewhere or not activities() or self._closed.is_set():
                return
            if self._display is None:
                self._display = Display(console=self._console, auto_refresh=False)
                self._display.start()
            self._display.update(self.line(), refresh=True)

    def _clear(self) -> None:
        with self._lock:
            if self._display is not None:
                self._display.stop()
                self._display = None

    def _log(self, stack: Sequence[Activity]) -> None:
        outermost = stack[0]
        if not outermost.overdue():
            return
        outermost.num_reports += 1
        inside = ""
        for current in stack[1:]:
            inside += f"; {current.what} ({current.state})"
        detail = self._latest_detail(stack)
        if detail:
            inside += f"; {detail}"
        LOGGER.info("%s: %s so far%s", outermost.what, outermost.state, inside)

    def _latest_detail(self, stack: Sequence[Activity]) -> str:
        """The innermost detail, asked for at most every DETAIL_S seconds."""
        now = time.monotonic()
        if now - self._detail_at >= DETAIL_S or stack[-1].started > self._detail_at:
            self._detail_at = now
            details = [current.detail() for current in stack if current.detail is not nothing]
            self._detail = details[-1] if details else ""
        return self._detail


class Display(Live):
    """A live display that log lines are printed above, however logging was set up."""

    def __init__(self, **settings: Any) -> None:
        # Where only stdout is a terminal, what goes to stderr stays there.
        super().__init__(transient=True, redirect_stderr=sys.stderr.isatty(), **settings)

    def start(self, refresh: bool = False) -> None:
        before = sys.stderr
        super().start(refresh)
        self._handlers = []
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._handlers.append(handler)
        self._point_handlers()

    def stop(self) -> None:
        super().stop()
        self._point_handlers()

    def _point_handlers(self) -> None:
        for handler in self._handlers:
            handler.setStream(sys.stderr)
