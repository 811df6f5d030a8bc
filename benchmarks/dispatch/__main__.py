"""Measures the single controller: calls without data, batches by reference, metadata operations,
and the controller's memory.

    python -m benchmarks.dispatch --json FILE

Everything is measured in one run against something else: bare Ray calls to the same actors, the
whole batch through the controller with torch.save, and verl's DataProto and worker group where verl
is importable (benchmarks/dispatch/verl_side.py). Ratios count; absolute times depend on the
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from benchmarks.dispatch.case import (
    NAMES,
    SIZES,
    Bench,
    load,
    make_columns,
    row_sums,
    save,
    seconds,
)
from cluster.connect import ClusterConfig, connect
from hybridflow.batch import Batch
from hybridflow.group import spawn
from hybridflow.pool import PoolSpec
from hybridflow.protocols import Arguments
from hybridflow.ray_pool import RayPool
from hybridflow.waiting import CALLS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--repeats", type=int, default=7, help="measurements of each number; medians are reported"
    )
    arguments = parser.parse_args()
    with connect(
        ClusterConfig(address="local", worker_logs=False, object_store_gib=4), cpu_slots=16
    ):
        result = measure(arguments.repeats)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def measure(repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {"noop_ratio": {str(n): noop_ratio(n, repeats) for n in (2, 4, 8)}}
    result |= round_trips(repeats)
    result["metadata_ms_max"] = metadata_ms()
    result |= against_verl(repeats, result["round_trip_ms"])
    return result


def noop_ratio(num_workers: int, repeats: int) -> float:
    """Time of ONE_TO_ALL without arguments over bare Ray calls to the same actors, interleaved."""
    ray_pool = RayPool(
        PoolSpec(name=f"noop{num_workers}", num_devices=num_workers, threads_per_device=1)
    )
    with ray_pool as pool:
        bench = spawn(Bench, pool, None)
        actors = ray_pool._actors

        def bare() -> None:
            ray.get([actor.__ray_ready__.remote() for actor in actors])

        def one_to_all() -> None:
            bench.noop()

        for call in (bare, one_to_all):
            seconds(call, 30)
        ratios = [seconds(one_to_all, 100) / seconds(bare, 100) for _ in range(repeats)]
        CALLS.finish()
    return statistics.median(ratios)


def round_trips(repeats: int) -> dict[str, Any]:
    """Distribute, identity, collect by reference, read by a second group; and the same through the
    controller."""
    milliseconds, speedup, growth = {}, {}, {}
    with (
        RayPool(PoolSpec(name="makers", num_devices=2, threads_per_device=1)) as left,
        RayPool(PoolSpec(name="readers", num_devices=2, threads_per_device=1)) as right,
    ):
        makers = spawn(Bench, left, None, role="makers")
        readers = spawn(Bench, right, None, role="readers")
        for size, factor in SIZES.items():
            columns = make_columns(factor)
            by_reference = partial(by_reference_round_trip, makers, readers, columns)
            through = partial(through_controller, makers, readers, columns)
            expected = row_sums(columns["bench_ids"], columns["bench_numbers"])
            assert torch.equal(by_reference().tensor("bench_sum"), expected)
            before = psutil.Process().memory_full_info().uss
            by_reference_s = statistics.median(seconds(by_reference) for _ in range(repeats))
            growth_bytes = psutil.Process().memory_full_info().uss - before
            through_s = statistics.median(seconds(through) for _ in range(max(3, repeats // 2)))
            milliseconds[size] = 1000 * by_reference_s
            speedup[size] = through_s / by_reference_s
            growth[size] = max(0, growth_bytes) / sum(value.nbytes for value in columns.values())
            CALLS.finish()
    return {
        "round_trip_ms": milliseconds,
        "speedup_controller": speedup,
        "controller_growth_fraction": growth,
    }


def by_reference_round_trip(
    makers: Bench, readers: Bench, columns: dict[str, torch.Tensor]
) -> Batch:
    # A new batch every time: the input is put into the store again, as a new step's would be.
    result = readers.read(makers.identity(Batch.of(**columns)))
    result.tensor("bench_sum")
    return result


def through_controller(makers: Bench, readers: Bench, columns: dict[str, torch.Tensor]) -> None:
    """Moves the batch as a driver that materialises batches does: split, serialise, call, collect,
    concatenate, and again for the next group."""
    for group in (makers, readers):
        calls = group._pool._callers(f"{group._role}.through_torch", 0)  # type: ignore[attr-defined]
        sent = []
        for rank in range(2):
            part = {name: value[rank::2] for name, value in columns.items()}
            sent.append(calls[rank].remote(Arguments((save(part),))))
        left, right = (load(reply.result) for reply in ray.get(sent))
        columns = {name: torch.cat([left[name], right[name]]) for name in NAMES}


def metadata_ms() -> float:
    """The slowest of union, select, reorder and split on the large batch, in ms (each the best
    of 20 calls, to leave other load out)."""
    batch = Batch.of(**make_columns(SIZES["large"]))
    order = np.random.default_rng(0).permutation(len(batch))
    left, right = batch.select("bench_ids"), batch.select("bench_numbers")
    operations: list[Callable[[], Any]] = [
        lambda: left | right,
        lambda: batch.select("bench_ids"),
        lambda: batch.reorder(order),
        lambda: batch.split(8),
    ]
    slowest = 0.0
    for operation in operations:
        slowest = max(slowest, min(seconds(operation) for _ in range(20)))
    return 1000 * slowest


def against_verl(repeats: int, by_reference_ms: dict[str, float]) -> dict[str, Any]:
    """verl's data-parallel round trip in this run: its default and its numpy serialisation;
    null where verl is missing."""
    if importlib.util.find_spec("verl") is None:
        return {"speedup_verl": None, "speedup_verl_numpy": None}
    from benchmarks.dispatch.verl_side import round_trip_ms

    default = round_trip_ms(repeats, serialization=None)
    numpy = round_trip_ms(repeats, serialization="numpy")
    return {
        "speedup_verl": {size: default[size] / by_reference_ms[size] for size in SIZES},
        "speedup_verl_numpy": {size: numpy[size] / by_reference_ms[size] for size in SIZES},
    }


if __name__ == "__main__":
    main()
