"""Sinks: where a Tracker's numbers and samples go. TensorBoard, Weights & Biases, Prometheus;
console.py and jsonl.py hold the other two.

A sink's library is imported when the sink is made, so that a run pays only for what it uses.
"""

from __future__ import annotations

import math
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybridflow.metrics.samples import TEXT_FIELDS, Sample, SampleRows

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


REPEAT_S = 1.0
"""Seconds between two settings of a Prometheus gauge; Ray reports at most once a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One call of Tracker.log.

    Row(step=3, split="train", time_s=1.7e9, metrics={"reward/mean": 0.5, "seconds/step": 2.0})
    """

    step: int
    split: str
    """train, validation, ..."""
    time_s: float
    """Seconds since the epoch."""
    metrics: Mapping[str, float]


class Sink(ABC):
    """A destination of metrics and samples. Its constructor raises a ValueError for everything
    that would make log fail."""

    failures: tuple[type[Exception], ...] = (OSError, RuntimeError)
    """The errors that log, show, summary and close may raise when the world breaks; the Tracker
    then drops the sink instead of the run."""

    @abstractmethod
    def log(self, row: Row) -> None: ...

    @abstractmethod
    def show(self, rows: SampleRows) -> None: ...

    def watch(self, values: Mapping[str, float]) -> None:
        """Takes where the run as a whole stands (vitals.py)."""
        del values  # no part of the history of steps, which most sinks hold

    @abstractmethod
    def summary(self, values: Mapping[str, object]) -> None: ...

    @abstractmethod
    def rewind(self, step: int, attempt: int) -> None:
        """The run goes back to the end of `step`: what was logged of later ones is given up and
        comes again. `attempt` is the number of the controller that it happened in."""

    @abstractmethod
    def close(self) -> None: ...


class TensorBoardSink(Sink):
    """Scalars <split>/<metric>, and samples as the text <split>/samples."""

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._make_writer = partial(SummaryWriter, str(directory), flush_secs=10)
        self._open(start_step + 1 if start_step >= 0 else None)

    def _open(self, first_step: int | None) -> None:
        """purge_step hides what was logged of the steps from `first_step` on."""
        self._writer = self._make_writer(purge_step=first_step)

    def log(self, row: Row) -> None:
        for name, value in row.metrics.items():
            self._writer.add_scalar(f"{row.split}/{name}", value, row.step, walltime=row.time_s)

    def show(self, rows: SampleRows) -> None:
        text = "\n\n---\n\n".join(map(_markdown, rows.samples))
        self._writer.add_text(f"{rows.split}/samples", text, rows.step, walltime=rows.time_s)

    def summary(self, values: Mapping[str, object]) -> None:
        lines = (f"| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("summary", "\n".join(["| | |", "|---|---|", *lines]))

    def rewind(self, step: int, attempt: int) -> None:
        self._writer.close()
        self._open(step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A Weights & Biases run that goes on under its old id when the directory holds one.
    Samples are a table <split>/samples of each step that shows any."""

    def __init__(
        self,
        directory: Path,
        project: str,
        run: str,
        mode: Literal["offline", "online"],
        run_config: Mapping[str, object],
    ) -> None:
        import wandb

        self.failures = (*Sink.failures, wandb.Error)
        id_file = directory / "wandb_id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        settings = wandb.Settings(silent=True)
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise ValueError(
                    "metrics.wandb: online, but nobody is logged in; run `wandb login`, or set "
                    "metrics.wandb=offline"
                )
            self._run = wandb.init(
                project=project,
                name=run,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(directory),
                config=dict(run_config),
                settings=settings,
            )
        except (wandb.Error, OSError) as error:
            raise ValueError(
                f"metrics.wandb: {mode} run could not be started: {error}; set "
                "metrics.wandb=offline or off"
            ) from error
        id_file.write_text(run_id)
        self._num_rewinds = 0
        # Its own step counter refuses to go back, as a resumed run must; ours is a value like any
        # other.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        values = {f"{row.split}/{name}": value for name, value in row.metrics.items()}
        self._run.log({"step": row.step, "rewinds": self._num_rewinds, **values})

    def show(self, rows: SampleRows) -> None:
        import wandb

        names, values = rows.table()
        table = wandb.Table(columns=[*names], data=values)
        self._run.log({"step": rows.step, f"{rows.split}/samples": table})

    def summary(self, values: Mapping[str, object]) -> None:
        self._run.summary.update(dict(values))

    def rewind(self, step: int, attempt: int) -> None:
        """Nothing can be taken back from the service: on the axis `step` the values of a replayed
        step stand over those of the lost one, and `rewinds` counts how often that happened."""
        self._num_rewinds += 1

    def close(self) -> None:
        self._run.finish()


class PrometheusSink(Sink):
    """Gauges hybridflow_<split>_<metric>, and hybridflow_run_<vital>, with tag run; Ray's agent on
    each node exports them with the prefix ray_.

    Ray sends a gauge once after it was set, at the next of its reports (every ten seconds,
    metrics_report_interval_ms), and forgets it two reports later. So a thread sets all gauges again
    and again, or a run's numbers would be gone during a step of more than 20 seconds. A step of
    less than ten seconds may be overwritten before anybody sees it. Ray drops a gauge that is not
    finite: hybridflow_<split>_num_not_finite counts those, for an alert to watch.
    """

    def __init__(self, run: str) -> None:
        import ray

        if not ray.is_initialized():
            raise ValueError(
                "metrics.prometheus: true needs a Ray runtime; set runtime=ray, or "
                "metrics.prometheus=false"
            )
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        """By names that may have labels in them; see labelled."""
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="prometheus", daemon=True).start()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            for name in tuple(self._values):
                self._set(name, self._values[name])

    def log(self, row: Row) -> None:
        num_not_finite = sum(not math.isfinite(value) for value in row.metrics.values())
        for name, value in [
            ("step", row.step),
            ("num_not_finite", num_not_finite),
            *row.metrics.items(),
        ]:
            self._set(f"{row.split}/{name}", value)

    def watch(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._set(name if labelled(name)[1] else f"run/{name}", value)

    def _set(self, name: str, value: float) -> None:
        metric, labels = labelled(name)
        gauge = self._gauge(metric, ("run", *labels))
        self._values[name] = value
        gauge.set(value, {"run": self._run, **labels})

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Gauge:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(prometheus_name(name), description=name, tag_keys=labels)
        return self._gauges[name]

    def show(self, rows: SampleRows) -> None:
        """Nothing: a gauge holds numbers only."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Nothing: a gauge holds the last value already."""

    def rewind(self, step: int, attempt: int) -> None:
        """Nothing: a gauge holds the last value."""

    def close(self) -> None:
        self._closed.set()


def _markdown(sample: Sample) -> str:
    """Texts as indented code, so that nothing in them is taken for Markdown."""
    lines = []
    for name, value in sample.fields().items():
        if name in TEXT_FIELDS:
            lines += [f"**{name}**", "", *(f"    {line}" for line in str(value).splitlines()), ""]
        else:
            lines.append(f"- {name}: {value}")
    return "\n".join(lines)


def labelled(name: str) -> tuple[str, dict[str, str]]:
    """The metric, and whose it is: host/policy/1/resident_bytes -> host/resident_bytes of
    {pool: policy, rank: 1}, node/10.0.0.7/oom_kills -> node/oom_kills of {node: 10.0.0.7}; of the whole
    run otherwise."""
    parts = name.split("/")
    keys = {"host": ("pool", "rank"), "node": ("node",)}.get(parts[0], ())
    if not keys or len(parts) != len(keys) + 2:
        return name, {}
    return f"{parts[0]}/{parts[-1]}", dict(zip(keys, parts[1:-1], strict=True))


def prometheus_name(name: str) -> str:
    """hybridflow_<name> with everything but letters and digits as single underscores: train/kl/mean
    -> hybridflow_train_kl_mean.

    Ray's exporter merges underscores, so doubled ones would come out under another name.
    """
    return "hybridflow_" + re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")
