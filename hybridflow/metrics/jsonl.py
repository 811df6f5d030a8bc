"""The JSONL record of a run: one flat JSON object a call of log, readable by pandas.read_json(lines=True).

Not-a-number and the infinities are not JSON; they are written as the strings "NaN", "Infinity" and
"-Infinity", which read_jsonl (and Python's float) turn back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridflow.metrics.sinks import Row, Sink

RESERVED = ("step", "split", "time_s")
"""Keys of every line beside the metrics."""


class JsonlSink(Sink):
    """<directory>/metrics.jsonl, flushed at every line, and <directory>/summary.json."""

    failures = ()

    def __init__(self, directory: Path, start_step: int) -> None:
        """Lines after `start_step` that an earlier run left are dropped; with start_step 0 the file starts
        afresh."""
        self._directory = directory
        path = directory / "metrics.jsonl"
        kept = (
            [row for row in read_jsonl(path) if row["step"] <= start_step]
            if start_step and path.exists()
            else []
        )
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(to_json(row), allow_nan=False) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def log(self, row: Row) -> None:
        values = {"step": row.step, "split": row.split, "time_s": round(row.time_s, 3), **row.metrics}
        self._file.write(json.dumps(to_json(values), allow_nan=False) + "\n")
        self._file.flush()

    def summary(self, values: Mapping[str, object]) -> None:
        path = self._directory / "summary.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(to_json(values), indent=2, allow_nan=False) + "\n")
        temporary.replace(path)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of `path` with floats restored. A last line cut off by a crash is left out; any other broken
    line is a ValueError."""
    lines = path.read_text().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON line ({error}); remove the line") from error
        rows.append({name: value if name in RESERVED else float(value) for name, value in row.items()})
    return rows


def to_json(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by its name."""
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
