"""Tracker: takes the numbers and samples of every step and hands them to the sinks that the config
names.

Computes nothing: no averages over steps, no units. Runs on the controller only; workers return
their numbers as results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from hybridflow.calls import CallRecord
from hybridflow.metrics.console import ConsoleSink
from hybridflow.metrics.jsonl import RESERVED, JsonlSink
from hybridflow.metrics.samples import Sample, SampleRows, SamplesConfig
from hybridflow.metrics.sinks import PrometheusSink, Row, Sink, TensorBoardSink, WandbSink
from hybridflow.progress import activity
from hybridflow.trace_file import TRACE, TraceFile
from hybridflow.wording import kind_of

logger = logging.getLogger(__name__)
SPEED, MEMORY = "tokens_per_s", "memory/"
"""The metric, and the prefix of metrics, that the trace draws over time."""
RECEIVER = "generation"
"""The role whose pool weights travel to."""


def nothing() -> None:
    pass


class WandbMode(StrEnum):
    off = "off"
    offline = "offline"
    """Written to <directory>/wandb; `wandb sync` uploads it later."""
    online = "online"


@dataclass(kw_only=True)
class MetricsConfig:
    """Where metrics go; each sink is one line."""

    console: bool = True
    """Live progress in a terminal, one line a step elsewhere (job logs)."""
    jsonl: bool = True
    """<directory>/metrics.jsonl, samples.jsonl (one object a call of log, and a sample) and
    summary.json."""
    tensorboard: bool = False
    """Event files in <directory>/tensorboard."""
    wandb: WandbMode = WandbMode.off
    prometheus: bool = False
    """Gauges on Ray's metrics endpoint (needs runtime=ray); Prometheus and Grafana read them
    from there."""
    project: str = "hybridflow"
    """Weights & Biases project."""
    run: str = "run"
    """Name of the run: the Weights & Biases run and the `run` tag of Prometheus gauges."""
    console_metrics: list[str] = field(
        default_factory=lambda: ["reward/mean", "kl/mean", "tokens_per_s"]
    )
    """Names that the console shows, in this order, where a step has them; seconds/<phase> are
    always shown.
   """
    trace: bool = True
    """<directory>/trace.json: what every rank and the controller did when, for ui.perfetto.dev."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Responses of the model that are shown with their rewards."""


class Tracker:
    """One per run.

        with Tracker(config.metrics, Path("outputs/ppo"), total_steps=100, start_step=40) as tracker:
            tracker.log(41, {"reward/mean": 0.5, "seconds/step": 2.1, "seconds/generation": 1.2})
            tracker.log(41, {"accuracy": 0.7}, split="validation")
            tracker.show(41, [Sample(prompt="2+3=", response="5", ...)], split="validation")
            tracker.summary({"accuracy_after": 0.93})

    Everything that can be wrong with a sink (nobody logged in, no Ray, a directory that cannot be
    written) is a ValueError of the constructor. A sink that breaks later is dropped with an error
    in the log and counted in metrics/failed_sinks; only the JSONL file, the record of the run, is
    not optional.
    """

    def __init__(
        self,
        config: MetricsConfig,
        directory: Path,
        *,
        total_steps: int,
        start_step: int = -1,
        run_config: Mapping[str, object] | None = None,
        before_writing: Callable[[], None] = nothing,
    ) -> None:
        """`start_step`: the step behind which the run goes on, 0 for the validation before the first
        one; what it logged after that is dropped. -1: a new run.
        `run_config` is shown beside the run. `before_writing` may raise, where nothing is to be written
        any more."""
        before_writing()
        self._before_writing = before_writing
        _make_writable(directory)
        self._sinks: list[Sink] = []
        self._trace: TraceFile | None = None
        self._watched: dict[str, float] = {}
        try:
            with activity("opening the metrics"):
                self._open(config, directory, total_steps, start_step, run_config or {})
        except BaseException:
            self.close()
            raise
        self._num_failed = 0

    def _open(
        self,
        config: MetricsConfig,
        directory: Path,
        total_steps: int,
        start_step: int,
        run_config: Mapping[str, object],
    ) -> None:
        if config.jsonl:
            self._sinks.append(JsonlSink(directory, start_step))
        if config.trace:
            self._trace = TraceFile(directory / TRACE, receiver=RECEIVER, start_step=start_step)
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(directory / "tensorboard", start_step))
        if config.wandb is not WandbMode.off:
            mode: Literal["offline", "online"] = (
                "online" if config.wandb is WandbMode.online else "offline"
            )
            self._sinks.append(WandbSink(directory, config.project, config.run, mode, run_config))
        if config.prometheus:
            self._sinks.append(PrometheusSink(config.run))
        if config.console:
            self._sinks.append(ConsoleSink(config.console_metrics, total_steps, start_step))

    def log(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None:
        """Record `metrics` of `step`; NaN and infinities are kept and stay visible in every
        sink."""
        values = {name: _number(name, value) for name, value in metrics.items()}
        if self._num_failed:
            values["metrics/failed_sinks"] = float(self._num_failed)
        row = Row(step=step, split=split, time_s=time.time(), metrics=values)
        self._to_all(lambda sink: sink.log(row))

    def show(self, step: int, samples: Sequence[Sample], *, split: str = "train") -> None:
        """Record responses of `step`; without any it does nothing."""
        if not samples:
            return
        rows = SampleRows(step=step, split=split, time_s=time.time(), samples=samples)
        self._to_all(lambda sink: sink.show(rows))

    def trace(
        self,
        records: Sequence[CallRecord],
        span: str = "",
        started: float = 0.0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Record calls that have ended and, where it has a name, what the controller did from
        `started` (Unix seconds) until now."""
        counters = {}
        for name, value in (metrics or {}).items():
            if name == SPEED or name.startswith(MEMORY):
                counters[name] = value

        def write(trace: TraceFile) -> None:
            trace.calls(records)
            if span:
                trace.span(span, started, time.time(), counters)

        self._to_trace(write)

    def _to_trace(self, write: Callable[[TraceFile], None]) -> None:
        if self._trace is None:
            return
        self._before_writing()
        try:
            write(self._trace)
        except OSError as error:
            logger.error("metrics: no more trace: %s", error)
            self._trace = None
            self._num_failed += 1

    def watch(self, values: Mapping[str, float]) -> None:
        """Record where the run as a whole stands (vitals.py), where that has changed."""
        if values != self._watched:
            self._watched = dict(values)
            self._to_all(lambda sink: sink.watch(values))

    def trace_failure(self, name: str, details: Mapping[str, Any]) -> None:
        """Mark a failure in the trace, now."""
        self._to_trace(lambda trace: trace.failure(name, time.time(), details))

    def summary(self, values: Mapping[str, object]) -> None:
        """Record the outcome of the run: JSON values, nested if need be."""
        self._to_all(lambda sink: sink.summary(values))

    def rewind(self, step: int, attempt: int = 0) -> None:
        """Give up what was logged of the steps after `step`: a recovery trains them again.
        `attempt` is the number of the controller, for the file that the lost lines go to."""
        self._to_all(lambda sink: sink.rewind(step, attempt))

    def close(self) -> None:
        """Flush and close every sink; called again it does nothing."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None
        while self._sinks:
            sink = self._sinks.pop()
            try:
                sink.close()
            except sink.failures as error:
                logger.error("metrics: closing %s failed: %s", type(sink).__name__, error)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _to_all(self, act: Callable[[Sink], None]) -> None:
        self._before_writing()
        for sink in list(self._sinks):
            try:
                act(sink)
            except sink.failures as error:
                self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        logger.error(
            "metrics: %s failed and is switched off for the rest of the run: %s",
            type(sink).__name__,
            error,
        )
        self._sinks.remove(sink)
        self._num_failed += 1


def _number(name: str, value: object) -> float:
    if name in RESERVED:
        raise ValueError(
            f"metrics: the name {name!r} is taken by the record itself; rename the metric (e.g. "
            f"actor/{name})"
        )
    if not isinstance(value, Real):
        raise ValueError(
            f"metrics: {name} is {kind_of(value)}, not a number; log a float (tensor.item())"
        )
    return float(value)


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"metrics: cannot write to {directory}: {error}; choose another output directory"
        ) from error
