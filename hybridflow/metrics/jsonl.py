"""The JSONL record of a run, readable by pandas.read_json(lines=True): a flat JSON object for every
call of log in metrics.jsonl, and for every sample in samples.jsonl.

Not-a-number and the infinities are not JSON; they are written as the strings "NaN", "Infinity" and
"-Infinity", which read_jsonl (and Python's float) turn back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridflow.disk import LineFile
from hybridflow.metrics.samples import SampleRows
from hybridflow.metrics.sinks import Row, Sink
from hybridflow.whole_file import whole_file

RESERVED = ("step", "split", "time_s")
"""Keys of every line of metrics.jsonl beside the metrics."""
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"


class JsonlSink(Sink):
    """<directory>/metrics.jsonl and samples.jsonl, flushed at every line, and
    <directory>/summary.json."""

    failures = ()

    def __init__(self, directory: Path, start_step: int) -> None:
        """Lines after `start_step` that an earlier controller left are dropped; -1: all of them."""
        self._directory = directory
        self._metrics = _continue(directory / METRICS, start_step)
        self._samples = _continue(directory / SAMPLES, start_step)
        self._lost: dict[int, LineFile] = {}
        """By attempt: the lines that recoveries took back."""

    def log(self, row: Row) -> None:
        fields = {"step": row.step, "split": row.split, "time_s": round(row.time_s, 3)}
        self._metrics.append(_line({**fields, **row.metrics}))

    def show(self, rows: SampleRows) -> None:
        _append_samples(self._samples, rows)

    def summary(self, values: Mapping[str, object]) -> None:
        write_summary(self._directory, values)

    def rewind(self, step: int, attempt: int) -> None:
        """The lost lines of metrics.jsonl go to lost/attempt-<attempt>.jsonl."""
        lost = [row for row in _rows_of(self._metrics) if row["step"] > step]
        for row in lost:
            self._lost_file(attempt).append(_line(row))
        for file in (self._metrics, self._samples):
            file.rewrite([_line(row) for row in _rows_of(file) if row["step"] <= step])

    def _lost_file(self, attempt: int) -> LineFile:
        if attempt not in self._lost:
            self._lost[attempt] = LineFile(self._directory / "lost" / f"attempt-{attempt}.jsonl")
        return self._lost[attempt]

    def close(self) -> None:
        for file in (self._metrics, self._samples, *self._lost.values()):
            file.write()
            with file.path.open("rb") as written:
                os.fsync(written.fileno())


def write_summary(directory: Path, values: Mapping[str, object]) -> None:
    """The outcome of a run, as <directory>/summary.json."""
    with whole_file(directory / SUMMARY) as path:
        path.write_text(json.dumps(to_json(values), indent=2, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with floats restored. A last line cut off by a crash is left
    out; any other broken line is a ValueError."""
    rows = _read_lines(path)
    for row in rows:
        for name, value in row.items():
            if name not in RESERVED:
                row[name] = float(value)
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, in order; a last line cut off by a crash is left out."""
    return _read_lines(path)


def replace_samples(path: Path, rows: SampleRows) -> None:
    """Writes the samples in place of those that the file has of the same split."""
    earlier = []
    if path.exists():
        earlier = [row for row in _read_lines(path) if row["split"] != rows.split]
    _append_samples(_rewrite(path, earlier), rows)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return _parsed(path.read_text(errors="replace"), path)  # no line of ours has such bytes


def _rows_of(file: LineFile) -> list[dict[str, Any]]:
    return _parsed(file.text(), file.path)


def _parsed(text: str, path: Path) -> list[dict[str, Any]]:
    lines = text.splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not a JSON line ({error}); remove the line"
            ) from error
    return rows


def _continue(path: Path, start_step: int) -> LineFile:
    """The file, without the lines after start_step."""
    rows = []
    if path.exists() and start_step >= 0:
        rows = [row for row in _read_lines(path) if row["step"] <= start_step]
    return _rewrite(path, rows)


def _rewrite(path: Path, rows: Sequence[Mapping[str, object]]) -> LineFile:
    """The file with these rows only. An OSError for what the disk refuses."""
    file = LineFile(path)
    file.rewrite(map(_line, rows))
    file.write()
    return file


def _append_samples(file: LineFile, rows: SampleRows) -> None:
    for sample in rows.samples:
        file.append(_line({"step": rows.step, "split": rows.split, **sample.record()}))


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(to_json(row), allow_nan=False)


def to_json(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by its name."""
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
