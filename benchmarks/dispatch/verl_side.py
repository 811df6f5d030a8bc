"""The dispatch benchmark's data-parallel round trip on verl's own DataProto and worker groups;
needs verl (0.9.1 runs on CPU).

The same batch and the same path: distribute over two ranks, identity, collect, distribute over a
second group, one number per row back.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch

from benchmarks.dispatch.case import SIZES, make_columns, row_sums

SERIALIZATION = "VERL_DATAPROTO_SERIALIZATION_METHOD"


def round_trip_ms(repeats: int, serialization: str | None) -> dict[str, float]:
    """Median ms of the small and the large batch; serialization: None (verl's default) or
    "numpy"."""
    import ray
    from verl import DataProto
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    class Peer(Worker):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            if serialization:
                os.environ[SERIALIZATION] = serialization

        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def identity(self, data: Any) -> Any:
            return data

        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def read(self, data: Any) -> Any:
            return DataProto.from_dict(
                {"bench_sum": row_sums(data.batch["bench_ids"], data.batch["bench_numbers"])}
            )

    before = os.environ.pop(SERIALIZATION, None)
    if serialization:
        os.environ[SERIALIZATION] = serialization
    try:

        def group(name: str) -> Any:
            pool = RayResourcePool(
                [2],
                use_gpu=False,
                max_colocate_count=1,
                name_prefix=f"{name}_{serialization or 'default'}",
            )
            peer = RayClassWithInitArgs(ray.remote(Peer))
            return RayWorkerGroup(
                pool,
                peer,
                use_gpu=False,
                device_name="cpu",
                name_prefix=f"{name}_{serialization or 'default'}",
            )

        makers, readers = group("makers"), group("readers")
        result = {}
        for size, factor in SIZES.items():
            columns = make_columns(factor)
            expected = row_sums(columns["bench_ids"], columns["bench_numbers"])
            times = []
            for _ in range(max(3, repeats // 2) + 1):
                data = DataProto.from_dict(dict(columns))
                started = time.perf_counter()
                answer = readers.read(makers.identity(data))
                times.append(time.perf_counter() - started)
                assert torch.equal(answer.batch["bench_sum"], expected)
            # The first one opens connections and imports.
            result[size] = 1000 * statistics.median(times[1:])
        for worker in (*makers.workers, *readers.workers):
            ray.kill(worker)
        return result
    finally:
        os.environ.pop(SERIALIZATION, None)
        if before is not None:
            os.environ[SERIALIZATION] = before
