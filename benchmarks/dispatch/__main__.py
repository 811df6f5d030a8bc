"""What the single controller costs: calls without data, batches by reference, metadata operations, and the
controller's memory.

python -m benchmarks.dispatch --json FILE

Everything is measured in one run against something else: bare Ray calls to the same actors, the whole batch
through the controller with torch.save, and verl's DataProto and worker group where verl is importable
(benchmarks/dispatch/verl_side.py). Ratios count; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cluster.connect import ClusterConfig, connect
from hybridflow.batch import Batch
from hybridflow.columns import declare
from hybridflow.group import spawn
from hybridflow.pool import PoolSpec, RayPool
from hybridflow.protocols import DP, ONE_TO_ALL
from hybridflow.waiting import CALLS
from hybridflow.worker import Worker, remote

ROWS, WIDTH = 1024, 2048
NAMES = ("bench_ids", "bench_numbers")
declare("bench_ids", "batch width", "int64", "1024 x 2048 whole numbers")
declare("bench_numbers", "batch width", "float32", "1024 x 2048 numbers")
declare("bench_sum", "batch", "float32", "a number per row, made from both")


class Bench(Worker):
    """Makes, passes on and reads batches."""

    @remote(ONE_TO_ALL)
    def noop(self) -> None:
        return None

    @remote(DP, reads=NAMES, writes=NAMES)
    def identity(self, batch: Batch) -> Batch:
        return Batch.of(**{name: batch[name] for name in NAMES})

    @remote(DP, reads=NAMES, writes=("bench_sum",))
    def read(self, batch: Batch) -> Batch:
        return Batch.of(
            bench_sum=batch.tensor("bench_ids")[:, 0].float() + batch.tensor("bench_numbers")[:, -1]
        )

    @remote(ONE_TO_ALL)
    def through_torch(self, data: bytes) -> bytes:
        """One rank's part of the batch the way of a driver that holds everything: bytes in, bytes out."""
        return _save(_load(data))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--repeats", type=int, default=7, help="measurements of each number; medians are reported"
    )
    arguments = parser.parse_args()
    with connect(ClusterConfig(address="local", worker_logs=False, object_store_gib=4), cpu_slots=16):
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
    """ONE_TO_ALL without arguments against bare Ray calls to the same actors, interleaved."""
    with RayPool(PoolSpec(name=f"noop{num_workers}", num_devices=num_workers, threads_per_device=1)) as pool:
        bench = spawn(Bench, pool, None)
        actors = pool._actors
        import ray

        def bare() -> None:
            ray.get([actor.__ray_ready__.remote() for actor in actors])

        def ours() -> None:
            list(bench.noop())  # type: ignore[call-overload]

        for call in (bare, ours):
            seconds(call, 30)
        ratios = [seconds(ours, 100) / seconds(bare, 100) for _ in range(repeats)]
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
        makers, readers = spawn(Bench, left, None, role="makers"), spawn(Bench, right, None, role="readers")
        for size, factor in (("small", 1), ("large", 8)):
            batch, numbers = make_batch(factor)
            by_reference = partial(by_reference_round_trip, makers, readers, batch)
            expected = batch.tensor("bench_ids")[:, 0].float() + batch.tensor("bench_numbers")[:, -1]
            assert torch.equal(by_reference().tensor("bench_sum"), expected)
            before = psutil.Process().memory_full_info().uss
            ours = [seconds(by_reference) for _ in range(repeats)]
            grown = psutil.Process().memory_full_info().uss - before
            through = [
                seconds(partial(through_controller, makers, readers, numbers))
                for _ in range(max(3, repeats // 2))
            ]
            milliseconds[size] = 1000 * statistics.median(ours)
            speedup[size] = statistics.median(through) / statistics.median(ours)
            growth[size] = max(0, grown) / sum(value.nbytes for value in numbers.values())
            CALLS.finish()
    return {
        "round_trip_ms": milliseconds,
        "speedup_controller": speedup,
        "controller_growth_fraction": growth,
    }


def make_batch(factor: int) -> tuple[Batch, dict[str, torch.Tensor]]:
    generator = np.random.default_rng(0)
    shape = (ROWS * factor, WIDTH)
    numbers = {
        "bench_ids": torch.from_numpy(generator.integers(0, 1000, shape)),
        "bench_numbers": torch.from_numpy(generator.random(shape, dtype=np.float32)),
    }
    return Batch.of(**numbers), numbers


def by_reference_round_trip(makers: Bench, readers: Bench, batch: Batch) -> Batch:
    # A batch of its own every time: the input is put into the store anew, as a new step's would be.
    fresh = Batch.of(**{name: batch[name] for name in NAMES})
    result = readers.read(makers.identity(fresh))
    result.tensor("bench_sum")
    return result


def through_controller(makers: Bench, readers: Bench, numbers: dict[str, torch.Tensor]) -> None:
    """What a driver does that materialises batches: split, serialise, call, collect, concatenate, and again
    for the next group."""
    for group in (makers, readers):
        parts = [{name: value[rank::2] for name, value in numbers.items()} for rank in range(2)]
        sent = [
            group._pool._callers(f"{group._role}.through_torch", 0)[rank].remote(_arguments(_save(part)))  # type: ignore[attr-defined]
            for rank, part in enumerate(parts)
        ]
        import ray

        back = [_load(reply.result) for reply in ray.get(sent)]
        numbers = {name: torch.cat([part[name] for part in back]) for name in numbers}


def _arguments(data: bytes) -> Any:
    from hybridflow.protocols import Arguments

    return Arguments((data,))


def metadata_ms() -> float:
    """The slowest of union, select, reorder and split on the large batch, in ms (best of several, to leave
    other load out)."""
    batch, _ = make_batch(8)
    order = np.random.default_rng(0).permutation(len(batch))
    left, right = batch.select("bench_ids"), batch.select("bench_numbers")
    operations: list[Callable[[], Any]] = [
        lambda: left | right,
        lambda: batch.select("bench_ids"),
        lambda: batch.reorder(order),
        lambda: batch.split(8),
    ]
    return max(min(seconds(operation) for _ in range(20)) for operation in operations) * 1000


def against_verl(repeats: int, ours: dict[str, float]) -> dict[str, Any]:
    """verl's data-parallel round trip in this run: its default and its numpy serialisation; null where verl
    is missing."""
    if importlib.util.find_spec("verl") is None:
        return {"speedup_verl": None, "speedup_verl_numpy": None}
    from benchmarks.dispatch.verl_side import round_trip_ms

    default, numpy = round_trip_ms(repeats, serialization=None), round_trip_ms(repeats, serialization="numpy")
    return {
        "speedup_verl": {size: default[size] / ours[size] for size in ours},
        "speedup_verl_numpy": {size: numpy[size] / ours[size] for size in ours},
    }


def seconds(call: Callable[[], object], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _save(part: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(part, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return loaded


if __name__ == "__main__":
    # Under its real name, so that the workers' processes find the class by import.
    from benchmarks.dispatch.__main__ import main as real_main

    real_main()
