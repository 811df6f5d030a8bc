"""The batch, the worker and the clock that both sides of benchmarks.dispatch share.

The worker stands here and not beside the command line, so that Ray's processes find its class by
import.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import torch

from hybridflow.batch import Batch
from hybridflow.columns import declare
from hybridflow.protocols import DP, ONE_TO_ALL
from hybridflow.worker import Worker, remote

ROWS, WIDTH = 1024, 2048
SIZES = {"small": 1, "large": 8}
"""Names of the two batches, and the factor on ROWS."""
NAMES = ("bench_ids", "bench_numbers")
declare("bench_ids", "batch width", "int64", "1024 x 2048 whole numbers")
declare("bench_numbers", "batch width", "float32", "1024 x 2048 numbers")
declare("bench_sum", "batch", "float32", "a number per row, computed from both")


class Bench(Worker):
    """Passes batches on and reads them."""

    @remote(ONE_TO_ALL)
    def noop(self) -> None:
        return None

    @remote(DP, reads=NAMES, writes=NAMES)
    def identity(self, batch: Batch) -> Batch:
        return Batch.of(**{name: batch[name] for name in NAMES})

    @remote(DP, reads=NAMES, writes=("bench_sum",))
    def read(self, batch: Batch) -> Batch:
        return Batch.of(
            bench_sum=row_sums(batch.tensor("bench_ids"), batch.tensor("bench_numbers"))
        )

    @remote(ONE_TO_ALL)
    def through_torch(self, data: bytes) -> bytes:
        """One rank's part of the batch as a driver that holds everything sends it: bytes in,
        bytes out."""
        return save(load(data))


def make_columns(factor: int) -> dict[str, torch.Tensor]:
    """The two columns of a batch of factor * ROWS rows."""
    generator = np.random.default_rng(0)
    shape = (ROWS * factor, WIDTH)
    return {
        "bench_ids": torch.from_numpy(generator.integers(0, 1000, shape)),
        "bench_numbers": torch.from_numpy(generator.random(shape, dtype=np.float32)),
    }


def row_sums(ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: the first id plus the last number of each row."""
    return ids[:, 0].float() + numbers[:, -1]


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Seconds per call, over `times` calls."""
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def save(part: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(part, buffer)
    return buffer.getvalue()


def load(data: bytes) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return loaded
