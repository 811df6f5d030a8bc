"""TraceFile: what every rank and the controller did and when, in the Trace Event format that
Perfetto (ui.perfetto.dev) and chrome://tracing open.

The file is an array that is never closed, which the format allows: whatever kills the run, what was
written can be read; the next controller removes an event that was cut off. Events wait in memory while
the disk is full. Once the file is MOST_BYTES long, it becomes trace-earlier.json and a new one begins,
so that a long run keeps its last steps. Times are microseconds of the nodes' clocks; nothing is
corrected for clocks that differ.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybridflow.calls import CallRecord
from hybridflow.disk import LineFile, remove_torn_end

TRACE = "trace.json"
CONTROLLER = "controller"
SYNC = "sync_weights"
"""The call in which one pool's weights travel to another one."""
MOST_BYTES = 128 * 2**20
BEGINNING = "["
"""The first line; an event is one of those behind it."""


class TraceFile:
    """One per run.

    with TraceFile(Path("outputs/ppo/trace.json")) as trace:
        trace.span("step 1", started, finished, {"tokens_per_s": 2100.0})
        trace.calls(records)
    """

    def __init__(
        self, path: Path, *, receiver: str = "", start_step: int = -1, most_bytes: int = MOST_BYTES
    ) -> None:
        """`receiver`: the role to which weights travel from the other pool. Goes on behind what an
        earlier controller left where `start_step` is one of its steps; -1: anew."""
        self._path, self._receiver, self._most_bytes = path, receiver, most_bytes
        self._file = LineFile(path)
        self._events: list[str] = []
        """Those that are not in the file yet."""
        if start_step < 0 or not path.exists():
            self._file.rewrite([BEGINNING])
        else:
            remove_torn_end(path)
        self._lanes: set[tuple[str, str]] = set()
        self._num_arrows = 0

    def span(
        self,
        name: str,
        started: float,
        finished: float,
        counters: Mapping[str, float] | None = None,
    ) -> None:
        """Something that the controller did, in Unix seconds, and numbers that hold at its end."""
        self._write([_slice(CONTROLLER, "loop", name, started, finished)], CONTROLLER, "loop")
        for counter, value in (counters or {}).items():
            self._append(
                {
                    "ph": "C",
                    "name": counter,
                    "pid": _number(CONTROLLER),
                    "ts": _microseconds(finished),
                    "args": {counter: value},
                }
            )
        self._flush()

    def calls(self, records: Iterable[CallRecord]) -> None:
        """The calls of a step, a slice for every rank; arrows where weights went to other pools."""
        senders: list[CallRecord] = []
        receivers: list[CallRecord] = []
        for record in records:
            for rank, (started, finished) in enumerate(record.ranks):
                lane = f"rank {rank}"
                name = f"{record.role}.{record.method}"
                self._write([_slice(record.pool, lane, name, started, finished)], record.pool, lane)
            if record.method == SYNC:
                side = receivers if record.role == self._receiver else senders
                side.append(record)
        for source, target in zip(senders, receivers, strict=False):
            self._num_arrows += 1
            self._arrow(source, "s", source.ranks[0][0])
            self._arrow(target, "f", target.ranks[0][1])
        self._flush()

    def failure(self, name: str, at: float, details: Mapping[str, Any]) -> None:
        """An instant on all lanes."""
        self._append(
            {
                "ph": "i",
                "s": "g",
                "name": name,
                "pid": _number(CONTROLLER),
                "tid": _number("loop"),
                "ts": _microseconds(at),
                "args": dict(details),
            }
        )
        self._flush()

    def close(self) -> None:
        self._flush()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, events: Iterable[dict[str, Any]], process: str, lane: str) -> None:
        if (process, lane) not in self._lanes:
            self._lanes.add((process, lane))
            for kind, name in (("process_name", process), ("thread_name", lane)):
                self._append(
                    {
                        "ph": "M",
                        "name": kind,
                        "pid": _number(process),
                        "tid": _number(lane),
                        "args": {"name": name},
                    }
                )
        for event in events:
            self._append(event)

    def _arrow(self, record: CallRecord, phase: str, at: float) -> None:
        event = {
            "ph": phase,
            "id": self._num_arrows,
            "cat": "weights",
            "name": "weights",
            "pid": _number(record.pool),
            "tid": _number("rank 0"),
            "ts": _microseconds(at),
        }
        if phase == "f":
            event["bp"] = "e"  # the arrow ends at the slice around it, not at the next one
        self._append(event)

    def _append(self, event: Mapping[str, Any]) -> None:
        self._events.append(json.dumps(event) + ",")

    def _flush(self) -> None:
        if self._events:
            self._file.append("\n".join(self._events))
            self._events.clear()
        if not self._file.is_waiting and self._path.stat().st_size > self._most_bytes:
            self._path.replace(self._path.with_name("trace-earlier.json"))
            self._file.rewrite([BEGINNING])
            self._lanes.clear()


def _slice(process: str, lane: str, name: str, started: float, finished: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": _number(process),
        "tid": _number(lane),
        "ts": _microseconds(started),
        "dur": _microseconds(finished) - _microseconds(started),
    }


def _number(name: str) -> int:
    """The format wants numbers for processes and threads; the same name has the same one in every
    part of a run."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
