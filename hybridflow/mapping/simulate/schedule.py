"""Schedule: when each call of a step starts and ends, from how long it takes and which pool it runs
in.

A call starts when its inputs have arrived and its pool is free; a pool runs its calls one at a time
in program order, as the runtime does. So pools overlap wherever the dataflow lets them: the paper's
d_cost (section 6) without barriers between its stages. Durations may be numbers or NumPy arrays
(many candidates at once).

A call that is drawn ahead delays nobody: its results for the step are there when the step begins, and
its pool works on those of a later step. So a step takes as long as the other calls need, or as long
as its pool is busy, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hybridflow.dataflow import CallKind, Dataflow

CONTROLLER = "controller"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Edge:
    """An input of a call: the index of its producer and the seconds that the data takes between
    their pools."""

    producer: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A call on the timeline."""

    call: str
    pool: str
    kind: CallKind
    start: float
    end: float


class Schedule:
    """Schedule(dataflow, pool_of={"actor": "a", ...}, edge_seconds).makespan(seconds)

    `pool_of` maps roles to pools; a role without pool (a Python function) runs beside the
    controller.
    """

    def __init__(
        self,
        dataflow: Dataflow,
        pool_of: dict[str, str],
        edge_seconds: dict[tuple[str, str], float],
        ahead: str | None = None,
    ) -> None:
        """`ahead`: the call that is drawn ahead, beside the rest of the step."""
        self._ahead: int | None = None
        if ahead is not None:
            self._ahead = dataflow.positions[ahead]
        self._calls = dataflow.calls
        index = dataflow.positions
        self.pools = [pool_of.get(call.role, CONTROLLER) for call in dataflow.calls]
        self._edges: list[list[Edge]] = []
        for position, call in enumerate(dataflow.calls):
            missing = [name for name in call.depends_on if index.get(name, position) >= position]
            if missing:
                raise ValueError(
                    f"dataflow {dataflow.algorithm}: {call.name} depends on {missing}, which no "
                    "earlier call provides"
                )
            edges = []
            for name in call.depends_on:
                producer, seconds = index[name], 0.0
                if self.pools[producer] != self.pools[position]:
                    seconds = edge_seconds.get((name, call.name), 0.0)
                edges.append(Edge(producer, seconds))
            self._edges.append(edges)

    def makespan(self, seconds: Sequence[float]) -> float:
        """The end of the last call; `seconds` are in program order."""
        if self._ahead is None:
            return self._last_end(seconds)
        others = list(seconds)
        others[self._ahead] = 0.0
        return max(self._last_end(others), sum(self._beside(seconds)))

    def makespans(self, seconds: Sequence[np.ndarray]) -> np.ndarray:
        """The same as makespan, for arrays of durations that broadcast against each other."""
        if self._ahead is None:
            return self._last_ends(seconds)
        others = list(seconds)
        others[self._ahead] = np.zeros(())
        beside: np.ndarray = np.zeros(())
        for duration in self._beside(seconds):
            beside = beside + duration
        longer: np.ndarray = np.maximum(self._last_ends(others), beside)
        return longer

    def _beside(self, seconds: Sequence[T]) -> list[T]:
        """The seconds of all calls of the pool that draws ahead."""
        assert self._ahead is not None
        pool = self.pools[self._ahead]
        return [
            duration for duration, other in zip(seconds, self.pools, strict=True) if other == pool
        ]

    def _last_end(self, seconds: Sequence[float]) -> float:
        ends: list[float] = []
        free: dict[str, float] = {}
        for duration, pool, edges in zip(seconds, self.pools, self._edges, strict=True):
            start = 0.0 if pool == CONTROLLER else free.get(pool, 0.0)
            for edge in edges:
                ready = ends[edge.producer] + edge.seconds
                if ready > start:
                    start = ready
            end = start + duration
            ends.append(end)
            free[pool] = end
        return max(ends)

    def _last_ends(self, seconds: Sequence[np.ndarray]) -> np.ndarray:
        ends: list[np.ndarray] = []
        free: dict[str, np.ndarray] = {}
        for duration, pool, edges in zip(seconds, self.pools, self._edges, strict=True):
            start: np.ndarray | None = None
            if pool != CONTROLLER:
                start = free.get(pool)
            for edge in edges:
                ready = ends[edge.producer]
                if edge.seconds:
                    ready = ready + edge.seconds
                start = ready if start is None else np.maximum(start, ready)
            end = np.asarray(duration) if start is None else start + duration
            ends.append(end)
            free[pool] = end
        result = ends[0]
        for end in ends[1:]:
            result = np.maximum(result, end)
        return result

    def bars(self, seconds: Sequence[float]) -> tuple[Bar, ...]:
        """The timeline, a bar for every call in program order; that of a call that is drawn ahead
        begins with the step, beside the others."""
        ends: list[float] = []
        free: dict[str, float] = {}
        bars = []
        for position, (call, duration, pool, edges) in enumerate(
            zip(self._calls, seconds, self.pools, self._edges, strict=True)
        ):
            if position == self._ahead:
                ends.append(0.0)
                bars.append(Bar(call.name, pool, call.kind, 0.0, duration))
                continue
            start = 0.0 if pool == CONTROLLER else free.get(pool, 0.0)
            for edge in edges:
                start = max(start, ends[edge.producer] + edge.seconds)
            ends.append(start + duration)
            free[pool] = ends[-1]
            bars.append(Bar(call.name, pool, call.kind, start, ends[-1]))
        return tuple(bars)

    def critical_path(self, seconds: Sequence[float]) -> tuple[str, ...]:
        """Names of the calls that decide the makespan, first to last."""
        bars = self.bars(seconds)
        current = max(range(len(bars)), key=lambda position: bars[position].end)
        path = [current]
        while bars[current].start > 0.0:
            start = bars[current].start - 1e-12
            before = []
            for edge in self._edges[current]:
                if bars[edge.producer].end + edge.seconds >= start:
                    before.append(edge.producer)
            for other in range(current):
                if bars[other].pool == bars[current].pool and bars[other].end >= start:
                    before.append(other)
            if not before:
                break
            current = max(before)
            path.append(current)
        return tuple(bars[position].call for position in reversed(path))
