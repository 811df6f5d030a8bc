"""Small workers for the runtime's tests: real hosts, no models."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.batch import Batch
from hybridflow.columns import Ragged, declare
from hybridflow.layout import Layout
from hybridflow.protocols import (
    ALL_TO_ALL,
    DP,
    ONE_TO_ALL,
    THREE_D,
    THREE_D_ALL_MICRO_DP,
    THREE_D_PP_ONLY,
)
from hybridflow.results import Metrics
from hybridflow.worker import Worker, remote

declare("test_ids", "batch time", "int64", "ragged numbers")
declare("test_length", "batch", "int64", "cost of a row")
declare("test_label", "batch", "int64", "label of a row")
declare("test_group", "batch", "int64", "prompt of a row")
declare("test_text", "batch", "object", "python values")
declare("test_double", "batch time", "int64", "twice test_ids")
declare("test_rank", "batch", "int64", "rank that made the row")
declare("test_half", "batch time", "bfloat16", "half of test_ids")
declare("test_seen", "batch", "object", "columns that the worker saw")


class Echo(Worker):
    """config: {"pp": 1, "tp": 1} and what else a test wants."""

    @classmethod
    def layouts(cls, config: Any, world_size: int) -> dict[str, Layout]:
        pp, tp = config.get("pp", 1), config.get("tp", 1)
        train = Layout.of(dp=world_size // (pp * tp), pp=pp, tp=tp)
        return {"train": train, "generation": Layout.of(dp=world_size)}

    @remote(ONE_TO_ALL)
    def noop(self) -> None:
        return None

    @remote(ONE_TO_ALL)
    def whoami(self, greeting: str = "") -> tuple[str, int, int]:
        return (greeting, self.context.rank, os.getpid())

    @remote(ALL_TO_ALL)
    def add(self, number: Any) -> Any:
        return number + self.context.rank

    @remote(THREE_D_PP_ONLY)
    def stage(self) -> tuple[int, int]:
        here = self.layouts(self.config, self.context.world_size)["train"].coordinates(
            self.context.rank
        )
        return (self.context.rank, here["pp"])

    @remote(
        THREE_D,
        reads=("test_ids",),
        optional=("test_text",),
        writes=("test_double", "test_rank", "test_seen"),
        balance="test_length",
        within="test_label",
    )
    def double(self, batch: Batch) -> Batch:
        ids = batch.ragged("test_ids")
        rank = torch.full((len(batch),), self.context.rank)
        return Batch.of(
            test_double=Ragged(ids.values * 2, ids.lengths),
            test_rank=rank,
            test_seen=[tuple(batch.columns)] * len(batch),
        )

    @remote(THREE_D_ALL_MICRO_DP, reads=("test_ids",), writes=("test_rank",))
    def micro(self, batch: Batch) -> Batch:
        return Batch.of(test_rank=torch.full((len(batch),), self.context.rank))

    @remote(
        THREE_D,
        reads=("test_ids",),
        writes=("test_rank",),
        balance="test_length",
        near="test_group",
    )
    def grouped(self, batch: Batch) -> Batch:
        return Batch.of(test_rank=torch.full((len(batch),), self.context.rank))

    @remote(DP, reads=("test_double",), writes=("test_half",))
    def half(self, batch: Batch) -> Batch:
        double = batch.ragged("test_double")
        return Batch.of(test_half=Ragged((double.values / 4).bfloat16(), double.lengths))

    @remote(THREE_D, reads=("test_ids",))
    def total(self, batch: Batch) -> Metrics:
        total = batch.ragged("test_ids").values.sum().reshape(1)
        dist.all_reduce(total)
        return Metrics({"total": float(total)})

    @remote(DP, reads=("test_ids",), writes=("test_rank",))
    def wrong_rows(self, batch: Batch) -> Batch:
        return Batch.of(test_rank=torch.zeros(len(batch) + 1, dtype=torch.int64))

    @remote(ONE_TO_ALL)
    def fail(self, rank: int, message: str = "it broke") -> None:
        if self.context.rank == rank:
            raise ValueError(message)
        dist.barrier()

    @remote(ONE_TO_ALL)
    def die(self, rank: int) -> None:
        if self.context.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    @remote(ONE_TO_ALL)
    def hang(self, rank: int) -> None:
        if self.context.rank != rank:
            dist.barrier()
        while self.context.rank == rank:
            time.sleep(0.5)

    @remote(ONE_TO_ALL)
    def stop(self, rank: int) -> None:
        """Stops the process of one rank as a debugger does; the others wait for it."""
        if self.context.rank == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()

    @remote(ONE_TO_ALL)
    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return time.time()


def numbers(rows: int, seed: int = 0, longest: int = 9) -> Batch:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest + 1, rows)
    ids = [generator.integers(0, 1000, length) for length in lengths]
    return Batch.of(
        test_ids=Ragged.of(ids, torch.int64),
        test_length=lengths,
        test_label=generator.integers(0, 3, rows),
        test_group=generator.integers(0, 5, rows),
        test_text=[str(i) for i in ids],
    )
