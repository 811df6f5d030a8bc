"""Pools, handles and waiting on real Ray actors: round trips, failures that surface, nothing
left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from hybridflow.batch import Batch
from hybridflow.calls import Pending
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.errors import TooFewDevices, WorkerDied, WorkerError, WorkerStuck
from hybridflow.failures import describe, failed_pools
from hybridflow.group import each, spawn, spawn_all, start
from hybridflow.layout import Layout
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec, ResourcePool, take_turns
from hybridflow.protocols import Arguments, Distribution, Protocol, Split
from hybridflow.ray_pool import RayPool, start_pools
from hybridflow.recovery.events import Kind
from hybridflow.waiting import CALLS, Calls
from hybridflow.worker import Worker, remote
from tests.runtime.workers import Echo, numbers

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[ResourcePool]:
    with RayPool(PoolSpec(name="four", num_devices=4, threads_per_device=1)) as pool:
        yield pool


@pytest.fixture(scope="module")
def echo(pool: ResourcePool) -> Echo:
    return spawn(Echo, pool, {"tp": 2}, role="echo")


def test_six_protocols(echo: Echo) -> None:
    batch = numbers(37)
    assert [(word, rank) for word, rank, _ in each(echo.whoami, "hi")] == [
        ("hi", rank) for rank in range(4)
    ]
    assert len({pid for _, _, pid in each(echo.whoami)}) == 4
    assert each(echo.add, [10, 20, 30, 40]) == [10, 21, 32, 43]
    assert each(echo.stage) == [(0, 0)]
    doubled = echo.double(batch)
    assert torch.equal(doubled.ragged("test_double").values, 2 * batch.ragged("test_ids").values)
    assert torch.equal(doubled.ragged("test_double").lengths, batch.ragged("test_ids").lengths)
    assert set(doubled.tensor("test_rank").tolist()) == {0, 2}, (
        "collected from t = 0 of both data coordinates"
    )
    assert set(echo.micro(batch).tensor("test_rank").tolist()) == {0, 1, 2, 3}
    half = echo.half(doubled)
    assert torch.equal(
        half.ragged("test_half").values.float(),
        (batch.ragged("test_ids").values / 2).bfloat16().float(),
    )


def test_a_worker_sees_only_what_it_reads(echo: Echo) -> None:
    seen = echo.double(numbers(5) | Batch.of(test_half=numbers_half(5)))["test_seen"]
    assert {name for columns in seen for name in columns} == {
        "test_ids",
        "test_text",
        "test_length",
        "test_label",
    }


def test_rows_of_one_prompt_go_to_one_data_coordinate(echo: Echo) -> None:
    """By a column that the method itself does not read."""
    groups = torch.arange(4).repeat_interleave(4)
    batch = Batch.of(
        test_ids=Ragged.of([[1, 2, 3]] * 16, torch.int64),
        test_length=torch.full((16,), 3),
        test_group=groups,
    )
    ranks = echo.grouped(batch).tensor("test_rank")
    assert sorted(ranks.tolist()) == [0] * 8 + [2] * 8
    assert all(len(set(ranks[groups == group].tolist())) == 1 for group in range(4))


def numbers_half(rows: int):  # type: ignore[no-untyped-def]
    from hybridflow.columns import Ragged

    return Ragged.of([[0.5]] * rows, torch.bfloat16)


def test_metrics_are_joined_without_waiting(echo: Echo) -> None:
    batch = numbers(9)
    # Both tensor ranks of a data coordinate hold the same rows.
    total = int(batch.ragged("test_ids").values.sum()) * 2
    assert dict(echo.total(batch)) == {"total": total}


def test_fewer_rows_than_ranks_and_none(echo: Echo) -> None:
    for rows in (0, 1, 3):
        assert echo.half(echo.double(numbers(rows))).num_rows == rows
        assert (
            echo.double(numbers(rows)).ragged("test_double").lengths.tolist()
            == numbers(rows).ragged("test_ids").lengths.tolist()
        )


def test_chains_do_not_pass_through_the_controller(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = numbers(20)
    doubled = echo.double(batch)
    fetched: list[str] = []
    monkeypatch.setattr(Batch, "__getitem__", lambda self, name: fetched.append(name))
    half = echo.half(doubled.select("test_double").reorder(np.arange(20)[::-1].copy()))
    monkeypatch.undo()
    assert fetched == []
    assert (
        half.ragged("test_half").lengths.tolist() == batch.ragged("test_ids").lengths.tolist()[::-1]
    )


def test_a_protocol_of_ones_own(pool: ResourcePool) -> None:
    def distribute(layout: Layout, arguments: Arguments, split: Split) -> Distribution:
        return Distribution(
            [arguments.map_batches(lambda b, r=r: b.rows([r % len(b)])) for r in range(layout.size)]
        )

    one_each = Protocol(
        name="ONE_ROW_EACH",
        distribute=distribute,
        collect=lambda layout, results: Batch.concat(results),
    )

    class Picky(Echo):
        @remote(one_each, reads=("test_ids",), writes=("test_double",))
        def first(self, batch: Batch) -> Batch:
            return Batch.of(test_double=batch["test_ids"])

    batch = numbers(3)
    picked = spawn(Picky, pool, {}, role="picky").first(batch)
    lengths = batch.ragged("test_ids").lengths.tolist()
    assert picked.ragged("test_double").lengths.tolist() == [*lengths, lengths[0]]


def test_wrong_calls_are_named(echo: Echo, pool: ResourcePool) -> None:
    with pytest.raises(
        ValueError, match=r"echo.half reads \['test_double'\], which the batch lacks"
    ):
        echo.half(numbers(3))
    with pytest.raises(AttributeError, match="no remote method 'doubel'"):
        echo.doubel(numbers(3))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"dp1 x tp3|tp3.*pool 'four' has 4"):
        spawn(Echo, pool, {"tp": 3}, role="thirds")
    with pytest.raises(ValueError, match=r"got 2 rows and returned 3|got 1 rows and returned 2"):
        echo.wrong_rows(numbers(5))["test_rank"]


def test_an_exception_arrives_with_role_rank_and_traceback() -> None:
    with RayPool(PoolSpec(name="failing", num_devices=2, threads_per_device=1)) as pool:
        echo = spawn(Echo, pool, {}, role="critic")
        with pytest.raises(
            ValueError, match=r"critic rank 1 in fail .pool failing.*it broke"
        ) as caught:
            echo.fail(1)
        assert isinstance(caught.value, WorkerError)
        assert caught.value.where.rank == 1
        assert "raise ValueError(message)" in caught.value.remote_traceback
        # Rank 0 waits in a barrier for rank 1, so the pool can't be used any more; it says why.
        with pytest.raises(RuntimeError, match=r"was stopped.*wait for a rank that failed"):
            echo.noop()


def test_a_killed_worker_is_named_while_another_result_is_read() -> None:
    with RayPool(PoolSpec(name="dying", num_devices=2, threads_per_device=1)) as pool:
        echo = spawn(Echo, pool, {}, role="actor")
        started = time.monotonic()
        with pytest.raises(WorkerDied, match=r"actor rank 1 died in die \(pid \d+") as caught:
            echo.die(1)
        assert time.monotonic() - started < 100
        assert "rank 1" in str(caught.value)
        pids = [host.pid for host in pool.hosts]  # type: ignore[attr-defined]
    assert_gone(pids)


def test_a_stuck_collective_ends_in_a_report_with_stacks() -> None:
    spec = PoolSpec(name="hanging", num_devices=2, threads_per_device=1, call_timeout_s=4.0)
    with RayPool(spec) as pool:
        echo = spawn(Echo, pool, {}, role="actor")
        with pytest.raises(WorkerStuck) as caught:
            echo.hang(1)
        report = str(caught.value)
        assert "actor.hang on pool hanging: ranks [0, 1] of 2 have not answered" in report
        assert "barrier" in report, "rank 0's stack shows the collective that it waits in"
        assert "in hang" in report, "rank 1's stack shows where it sleeps"
        pids = [host.pid for host in pool.hosts]  # type: ignore[attr-defined]
    assert_gone(pids)


def test_time_in_which_this_process_was_suspended_is_no_standstill() -> None:
    """Ctrl-Z and fg, or a container that is paused with all its processes; the same time without a
    pause is one."""
    calls, killed = Calls(), list[str]()
    sleeping = ray.remote(lambda: time.sleep(60)).options(num_cpus=0).remote()
    call = Pending(
        role="actor",
        method="update_actor",
        pool="main",
        replies=(sleeping,),
        stacks=lambda: {0: "stack"},
        kill=killed.append,
        describe_host=str,
        explain_death=str,
        activity=str,
        timeout_s=20.0,
    )
    calls.add(call)
    for _ in range(2):
        calls.progress["main"] = calls.looked_at = time.monotonic() - 100.0
        calls.check()
    calls.progress["main"] = time.monotonic() - 100.0
    with pytest.raises(WorkerStuck, match="no call finished for 20 s"):
        calls.check()
    assert killed
    ray.cancel(sleeping, force=True)


def test_a_stopped_rank_is_named_while_another_pool_works_and_both_go_on() -> None:
    """R5, R6: the other pool finishes calls all the time, and its last one after the failure."""
    spec = PoolSpec(
        name="halting",
        num_devices=2,
        threads_per_device=1,
        collective_timeout_s=2.0,
        call_timeout_s=30.0,
    )
    with RayPool(spec) as pool, RayPool(PoolSpec(name="busy", threads_per_device=1)) as other:
        echo = spawn(Echo, pool, {}, role="actor")
        busy = spawn(Echo, other, {}, role="critic")
        for _ in range(12):
            start(busy.sleep, 1.0)
        with pytest.raises(WorkerStuck) as caught:
            echo.stop(1)
        (place,) = caught.value.places
        assert (place.pool, place.role, place.rank, place.method) == ("halting", "actor", 1, "stop")
        failure, evidence = describe(caught.value, step=3)
        assert (failure.kind, failure.rank) == (Kind.hung, 1) and "rank 1" in evidence
        assert failed_pools(caught.value) == {"halting"}
        CALLS.quiesce(60.0)
        assert pool.broken and not other.broken
        pids = {host.pid for host in pool.hosts}
        pool.restart()
        assert not pids & {host.pid for host in pool.hosts}
        assert_gone(list(pids), within_s=0.1)
        assert [rank for _, rank, _ in each(echo.whoami)] == [0, 1]
        assert len(each(busy.whoami)) == 1


class Meeting(Worker):
    """Is built once another process of the other pool is being built too: as often as this one."""

    def __init__(self, config: tuple[str, str, str], context: RankContext) -> None:
        super().__init__(config, context)
        directory, here, there = Path(config[0]), config[1], config[2]
        (directory / f"{here}.{os.getpid()}").touch()
        times, end = len(list(directory.glob(f"{here}.*"))), time.monotonic() + 60
        while len(list(directory.glob(f"{there}.*"))) < times:
            assert time.monotonic() < end, f"{there} is not being built"
            time.sleep(0.05)


def test_pools_are_built_and_restarted_at_the_same_time(tmp_path: Path) -> None:
    """Each is being built while the other is; one that does not come up leaves none."""
    specs = [PoolSpec(name=name, threads_per_device=1) for name in ("left", "right")]
    left, right = start_pools(specs)
    with left, right:
        spawn_all(
            {
                "one": (Meeting, left, (str(tmp_path), "left", "right")),
                "other": (Meeting, right, (str(tmp_path), "right", "left")),
            }
        )
        pids = left.pids() + right.pids()
        take_turns([pool.restarting() for pool in (left, right)])
        assert len(list(tmp_path.iterdir())) == 4
        assert not set(pids) & {*left.pids(), *right.pids()}
        assert_gone(pids, within_s=0.1)
    wrong = PoolSpec(name="wrong", num_devices=999, start_timeout_s=1.0)
    with pytest.raises(TooFewDevices):
        start_pools([specs[0], wrong])
    named = ray.util.list_named_actors()
    assert not [name for name in named if name.startswith(("left/", "right/", "wrong/"))]


def test_pools_overlap() -> None:
    spec = PoolSpec(num_devices=1, threads_per_device=1)
    with (
        RayPool(PoolSpec(**{**_fields(spec), "name": "left"})) as left,
        RayPool(PoolSpec(**{**_fields(spec), "name": "right"})) as right,
    ):
        one, other = spawn(Echo, left, {}), spawn(Echo, right, {})
        one.noop(), other.noop()
        CALLS.finish()
        both = [start(one.sleep, 1.0), start(other.sleep, 1.0)]
        assert [len(ranks) for ranks in both] == [1, 1]
        first, second = CALLS.finish()
        assert first.started < second.finished and second.started < first.finished, (
            "the two calls overlapped"
        )


def test_two_roles_of_one_pool_share_processes_and_differ_in_layout(pool: ResourcePool) -> None:
    wide = spawn(Echo, pool, {"pp": 4}, role="wide")
    narrow = spawn(Echo, pool, {"tp": 4}, role="narrow")
    assert [pid for _, _, pid in each(wide.whoami)] == [pid for _, _, pid in each(narrow.whoami)]
    assert each(wide.stage) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert each(narrow.stage) == [(0, 0)]


def test_too_many_devices_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"pool 'huge': 999 devices .*the cluster has"):
        RayPool(PoolSpec(name="huge", num_devices=999, start_timeout_s=1.0))


def test_a_pool_asks_for_nodes_with_a_resource() -> None:
    """Every cluster's first node has node:__internal_head__; a second kind of node stands in
    docs/mapping.md."""
    spec = PoolSpec(
        name="marked", num_devices=1, threads_per_device=1, node_resource="node:__internal_head__"
    )
    with RayPool(spec) as pool:
        assert pool.hosts[0].node_id
    with pytest.raises(ValueError, match=r"accelerator_type:H100'?: 0.001.* could not be reserved"):
        RayPool(
            PoolSpec(
                name="elsewhere",
                num_devices=1,
                node_resource="accelerator_type:H100",
                start_timeout_s=1.0,
            )
        )


def test_local_pool_is_the_same_without_processes() -> None:
    with LocalPool(PoolSpec()) as pool:
        echo = spawn(Echo, pool, {})
        batch = numbers(7)
        assert torch.equal(
            echo.double(batch).ragged("test_double").values, 2 * batch.ragged("test_ids").values
        )
        assert each(echo.whoami, "here") == [("here", 0, os.getpid())]
        with pytest.raises(ValueError, match=r"^it broke$"):
            echo.fail(0)
    with pytest.raises(ValueError, match="num_devices=2 with runtime=local"):
        LocalPool(PoolSpec(num_devices=2))


def _fields(spec: PoolSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def assert_gone(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.1)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
