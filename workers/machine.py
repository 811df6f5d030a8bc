"""MachineWorker: what the machines of a pool can do, asked before the models are placed on them."""

from __future__ import annotations

from hybridflow.protocols import ONE_TO_ALL
from hybridflow.worker import Worker, remote
from workers.precision import computes_bf16


class MachineWorker(Worker):
    """all(each(spawn(MachineWorker, pool, None, role="machine").computes_bf16))"""

    @remote(ONE_TO_ALL)
    def computes_bf16(self) -> bool:
        return computes_bf16(self.context.device)
