"""Stragglers and memory: scores against arithmetic by hand, what is said and written of hosts, and a
really slowed process among real ones."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridflow.group import each, spawn
from hybridflow.host_state import HostState
from hybridflow.host_watch import HOSTS, HostWatch
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from hybridflow.ray_pool import RayPool
from hybridflow.stragglers import PATIENCE, WINDOW, Scores, Straggler
from tests.runtime.workers import Echo

USUAL, SLOW = 0.010, 0.020


def looks(scores: Scores, seconds: dict[tuple[str, int], float], number: int) -> list[Straggler]:
    named = []
    for _ in range(number):
        named += scores.add(seconds)
    return named


def test_scores_by_hand() -> None:
    """Half the speed of the others and of its own best; one look that is not slow begins the count
    anew; a process that takes another's place begins anew."""
    scores = Scores()
    usual = {("policy", rank): USUAL for rank in range(3)}
    slowed = usual | {("policy", 1): SLOW}
    assert not looks(scores, usual, WINDOW)
    assert not looks(scores, slowed, PATIENCE - 1)
    assert not looks(scores, usual, 1)
    assert not looks(scores, slowed, PATIENCE - 1)
    assert looks(scores, slowed, 1) == [Straggler(("policy", 1), 0.5, 0.5)]
    assert not looks(scores, slowed, 9)
    assert scores.score("policy", 0) == scores.score("policy", 2) == 1.0
    assert not looks(scores, usual, WINDOW)
    assert scores.score("policy", 1) == 1.0
    assert looks(scores, slowed, PATIENCE) == [Straggler(("policy", 1), 0.5, 0.5)]
    scores.forget(("policy", 1))
    assert looks(scores, slowed, PATIENCE) == [Straggler(("policy", 1), 0.5, 1.0)]


def test_all_slow_at_once_is_nobodys_doing() -> None:
    """Their own scores tell; a host without others is held against itself."""
    scores, alone = Scores(), Scores()
    hosts = [("policy", 0), ("policy", 1)]
    for seconds in (USUAL, SLOW, math.nan):
        assert not looks(scores, dict.fromkeys(hosts, seconds), PATIENCE)
    assert [scores.individual(*host) for host in hosts] == [0.5, 0.5]
    assert not looks(alone, {hosts[0]: USUAL}, WINDOW)
    assert looks(alone, {hosts[0]: SLOW}, PATIENCE) == [Straggler(hosts[0], 1.0, 0.5)]


class Answering(LocalPool):
    """A pool whose hosts say what a test gives them."""

    def __init__(self, states: Sequence[HostState]) -> None:
        super().__init__(PoolSpec(name=states[0].pool))
        self.states, self.num_asked = states, 0

    def look(self) -> Sequence[Any]:
        self.num_asked += 1
        return self.states

    def looked(self, answers: Sequence[Any]) -> list[HostState] | None:
        return list(answers)


def state(rank: int, **changes: Any) -> HostState:
    usual = HostState(
        pool="policy",
        rank=rank,
        node="10.0.0.7",
        pid=100 + rank,
        probe_s=USUAL,
        cost_s=0.0004,
        resident_bytes=10**9,
        peak_bytes=2 * 10**9,
        used_bytes=6 * 10**9,
        limit_bytes=8 * 10**9,
        oom_kills=2,
    )
    return replace(usual, **changes)


def test_memory_is_said_once_and_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Answering([state(0), state(1, resident_bytes=3 * 10**9)])
    watch = HostWatch({"policy": pool}, tmp_path, cost_fraction=math.inf)
    watch.look(1)
    watch.look(2)
    assert not caplog.records
    pool.states = [state(0, used_bytes=7_300_000_000), pool.states[1]]
    for step in range(3, 6):
        watch.look(step)
    (near,) = caplog.messages
    assert "node 10.0.0.7: 7.3 of 8 GB are in use" in near
    assert "the largest host is rank 1 of pool policy with 3 GB" in near
    pool.states = [state(0, oom_kills=3), state(1, oom_kills=3, pid=999)]
    for step in range(6, 9):
        watch.look(step)
    assert "the kernel has ended 1 processes for want of memory" in caplog.messages[-1]
    assert len(caplog.messages) == 2
    lines = [json.loads(line) for line in (tmp_path / HOSTS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 9))
    assert lines[0]["hosts"][1]["resident_bytes"] == 3 * 10**9
    assert watch.values["node/10.0.0.7/oom_kills"] == 3
    assert watch.values["node/10.0.0.7/memory_limit_bytes"] == 8e9
    assert watch.values["host/policy/1/straggler_score"] == 1.0


def test_looks_are_thinned_out_where_steps_are_short() -> None:
    """An answer of 0.4 ms at 0.4 % of the time: one look in 0.1 s, however many steps there are."""
    pool = Answering([state(0)])
    watch = HostWatch({"policy": pool}, None)
    watch.look(0)
    started = time.monotonic()
    while time.monotonic() - started < 0.55:
        watch.look(1)
        time.sleep(0.001)
    assert 4 <= pool.num_asked - 1 <= 6


@contextmanager
def stopped_now_and_then(pid: int) -> Iterator[None]:
    """The process gets a fifth of the time that it wants."""
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.012)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.003)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("ray_cluster")
def test_a_really_slowed_process_is_named_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with RayPool(PoolSpec(name="policy", num_devices=3, threads_per_device=1)) as pool:
        echo = spawn(Echo, pool, {}, role="actor")
        watch = HostWatch({"policy": pool}, tmp_path, cost_fraction=math.inf)
        for step in range(12):
            watch.look(step)
            each(echo.whoami)
        assert not caplog.messages
        with stopped_now_and_then(pool.pids()[1]):
            for step in range(12, 30):
                watch.look(step)
                each(echo.whoami)
        watch.look(30)
    (named,) = caplog.messages
    assert f"actor rank 1 of pool policy (pid {pool_pid(tmp_path, 1)} on " in named
    scores = [watch.values[f"host/policy/{rank}/straggler_score"] for rank in range(3)]
    assert scores[1] < 0.5 < 0.7 < min(scores[0], scores[2])
    assert watch.values["host/policy/0/resident_bytes"] > 10**8


def pool_pid(directory: Path, rank: int) -> int:
    """The process of a rank, by hosts.jsonl."""
    last = json.loads((directory / HOSTS).read_text().splitlines()[-1])
    return int(last["hosts"][rank]["pid"])
