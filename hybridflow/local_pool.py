"""LocalPool: a pool of one device in this very process, world size 1, so that breakpoints work."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hybridflow.batch import Batch
from hybridflow.calls import CallRecord, Reply
from hybridflow.context import RankContext
from hybridflow.devices import (
    DETERMINISTIC,
    peak_memory,
    repeat_results,
    requested_threads,
)
from hybridflow.host import written_blocks
from hybridflow.pool import Parts, PoolSpec, ResourcePool
from hybridflow.progress import activity
from hybridflow.protocols import Arguments
from hybridflow.store import Held
from hybridflow.waiting import CALLS, nothing
from hybridflow.worker import Worker, declared_methods


class LocalPool(ResourcePool):
    """One device, in this process: `runtime=local`. Calls run at once and raise where they fail."""

    def __init__(self, spec: PoolSpec | None = None) -> None:
        spec = spec or PoolSpec()
        if spec.num_devices != 1:
            raise ValueError(
                f"pool {spec.name!r}: num_devices={spec.num_devices} with runtime=local; set "
                "num_devices=1 or runtime=ray"
            )
        self.spec = spec
        device = "cuda:0" if spec.device == "cuda" else "cpu"
        threads = spec.threads_per_device or requested_threads() or (os.cpu_count() or 1)
        self.context = RankContext(
            pool=spec.name,
            device=device,
            num_threads=threads,
            deterministic=spec.deterministic and spec.device == "cuda",
        )
        self.workers: dict[str, Worker] = {}
        _join_world_of_one(self.context, spec.collective_timeout_s)

    @property
    def role_names(self) -> tuple[str, ...]:
        return tuple(self.workers)

    def begin_creating(
        self, role: str, worker_class: type[Worker], config: Any
    ) -> Callable[[], None]:
        self._check_usable()
        self.workers[role] = worker_class(config, replace(self.context, role=role))
        return nothing

    def submit(
        self,
        role: str,
        method: str,
        arguments: Sequence[Arguments],
        keep: Sequence[bool],
        num_columns: int,
    ) -> list[tuple[Any, list[Any]]]:
        self._check_usable()
        started = time.time()
        (own,) = arguments
        local = own.map_batches(lambda batch: batch.local(batch.columns))
        with activity(f"{role}.{method}"):
            # The RPC layer's one lookup by name.
            worker = self.workers[role]
            result = getattr(worker, method)(*local.args, **local.kwargs)
        columns: list[Held] = []
        if num_columns:
            writes = declared_methods(type(worker), worker.config)[method].writes
            columns = list(map(Held, written_blocks(f"{role}.{method}", result, writes, local)))
        reply = Reply(
            started=started,
            finished=time.time(),
            num_rows=len(result) if num_columns else None,
            result=None if num_columns else result,
        )
        CALLS.records.append(
            CallRecord(
                role=role,
                method=method,
                pool=self.name,
                ranks=((started, reply.finished),),
                peak_bytes=(peak_memory(self.context.device),),
            )
        )
        return [(reply, columns)]

    def read_replies(self, replies: Sequence[Any]) -> list[Reply]:
        return list(replies)

    def arrived(self, replies: Sequence[Any]) -> bool:
        del replies  # a call has ended when it returns
        return True

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def node(self, rank: int) -> str | None:
        return None

    def pids(self) -> list[int]:
        return [os.getpid()]

    def activity(self) -> str:
        return ""

    def restarting(self) -> Parts:
        raise RuntimeError(
            f"pool {self.name!r} is this very process (runtime=local), which can't be restarted"
        )

    def clear(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def close(self) -> None:
        CALLS.forget(self.name)
        self.broken = self.broken or "closed"
        self.clear()


def _join_world_of_one(context: RankContext, timeout_s: float) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    torch.set_num_threads(context.num_threads)
    if context.deterministic:
        os.environ.update(DETERMINISTIC)
        repeat_results()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if context.device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=timeout_s),
        )
        atexit.register(_leave_world)


def _leave_world() -> None:
    """NCCL's threads end before the process does."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
