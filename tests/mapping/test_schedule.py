"""Schedules against a naive simulation in small time steps, and placements against counting."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from hybridflow.dataflow import Call, CallKind, Dataflow
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.search.placements import packs, placements
from hybridflow.mapping.simulate.schedule import Schedule


def random_case(seed: int):
    """A random graph of six calls over three roles in one to three pools, with whole seconds."""
    draw = random.Random(seed)
    roles = ["a", "b", "c"]
    calls, seconds = [], []
    for index in range(6):
        before = [call.name for call in calls if draw.random() < 0.4]
        role = draw.choice([*roles, "controller"])
        kind = CallKind.controller if role == "controller" else CallKind.inference
        calls.append(
            Call(
                name=f"{role}.{index}",
                role=role,
                method=str(index),
                kind=kind,
                depends_on=tuple(before),
            )
        )
        seconds.append(draw.randint(0, 5))
    pool_of = {role: str(draw.randint(0, 2)) for role in roles}
    edges = {(name, call.name): draw.randint(0, 2) for call in calls for name in call.depends_on}
    return Dataflow(algorithm="random", calls=tuple(calls)), seconds, pool_of, edges


def second_by_second(dataflow, seconds, pool_of, edges) -> int:
    """Each second a pool works on its first unfinished call once that call's inputs are there;
    the controller waits for inputs only."""
    end: dict[str, int] = {}
    started: dict[str, int] = {}
    now = 0
    while len(end) < len(dataflow.calls):
        for call, duration in zip(dataflow.calls, seconds, strict=True):
            pool = pool_of.get(call.role)
            if call.name not in started:
                ahead = [
                    other
                    for other in dataflow.calls[: dataflow.calls.index(call)]
                    if pool and pool_of.get(other.role) == pool
                ]
                free = all(other.name in end and end[other.name] <= now for other in ahead)

                def arrival(name: str, call=call, pool=pool) -> float:
                    apart = pool_of.get(dataflow.call(name).role) != pool
                    return end.get(name, float("inf")) + (edges[name, call.name] if apart else 0)

                if free and all(arrival(name) <= now for name in call.depends_on):
                    started[call.name] = now
            if (
                call.name in started
                and call.name not in end
                and started[call.name] + duration == now
            ):
                end[call.name] = now
        # zero-length calls may unlock others at the same moment: look again before time moves on
        if all(
            call.name in end
            or call.name in started
            or not _ready(call, dataflow, end, pool_of, edges, now)
            for call in dataflow.calls
        ):
            now += 1
    return max(end.values())


def _ready(call, dataflow, end, pool_of, edges, now) -> bool:
    pool = pool_of.get(call.role)
    ahead = [
        other
        for other in dataflow.calls[: dataflow.calls.index(call)]
        if pool and pool_of.get(other.role) == pool
    ]
    arrived = all(
        end.get(name, float("inf"))
        + (edges[name, call.name] if pool_of.get(dataflow.call(name).role) != pool else 0)
        <= now
        for name in call.depends_on
    )
    return arrived and all(other.name in end and end[other.name] <= now for other in ahead)


@pytest.mark.parametrize("seed", range(60))
def test_makespan_equals_second_by_second_simulation(seed):
    dataflow, seconds, pool_of, edges = random_case(seed)
    schedule = Schedule(dataflow, pool_of, edges)
    assert schedule.makespan(seconds) == second_by_second(dataflow, seconds, pool_of, edges)
    assert max(bar.end for bar in schedule.bars(seconds)) == schedule.makespan(seconds)
    path = schedule.critical_path(seconds)
    assert next(
        bar.end for bar in schedule.bars(seconds) if bar.call == path[-1]
    ) == schedule.makespan(seconds)


def test_many_schedules_at_once_equal_one_by_one():
    dataflow, _, pool_of, edges = random_case(1)
    schedule = Schedule(dataflow, pool_of, edges)
    rows = np.random.default_rng(0).uniform(0, 5, (50, 6))
    together = schedule.makespans([rows[:, column] for column in range(6)])
    assert together == pytest.approx([schedule.makespan(list(row)) for row in rows])


def test_a_call_before_its_producer_is_refused():
    call = Call(name="a.x", role="a", method="x", kind=CallKind.inference, depends_on=("b.y",))
    with pytest.raises(ValueError, match=r"a\.x depends on \['b\.y'\]"):
        Schedule(Dataflow(algorithm="wrong", calls=(call,)), {"a": "0"}, {})


def test_placements_are_the_set_partitions():
    assert [len(list(placements("abcde"[:count]))) for count in range(1, 6)] == [1, 2, 5, 15, 52]
    seen = {frozenset(frozenset(part) for part in placement) for placement in placements("abcd")}
    assert len(seen) == 15
    assert all(
        sorted(role for part in placement for role in part) == list("abcd")
        for placement in placements("abcd")
    )


def test_packing_equals_trying_every_node():
    cluster = Cluster.parse("3x4xA100-80GB")
    for sizes in product((1, 2, 3, 4, 8), repeat=4):
        small = [size for size in sizes if size < 4]
        whole = sum(size // 4 for size in sizes if size >= 4)
        fits = whole <= 3 and any(
            all(
                sum(size for size, where in zip(small, nodes, strict=True) if where == node) <= 4
                for node in range(3 - whole)
            )
            for nodes in product(range(max(1, 3 - whole)), repeat=len(small))
            if whole < 3 or not small
        )
        assert packs(cluster, [(0, size) for size in sizes]) == fits, sizes
