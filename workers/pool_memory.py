"""PoolMemory: who has the memory of a pool's devices, generation or the training engines.

Generation needs its weights and its key/value cache only while it generates, training engines need
optimizer states only while they train. With release_during_training neither is on the device while
the other works, whichever role it belongs to: a critic's, reference's or reward model's call finds
the generation engine asleep. Collective only in that every rank makes the same calls in the same
order.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from workers.engines.base import TrainingEngine


class GenerationHolder(Protocol):
    """A role whose generation engine gives its memory back between generations."""

    def release_generation(self) -> None:
        """Free the engine's weights and cache; nothing to do if they are free."""


class PoolMemory:
    """memory = pool_memory("main"); memory.engines.add(engine); memory.for_training()

    One per pool in each of its processes.
    """

    def __init__(self) -> None:
        self.holders: WeakSet[GenerationHolder] = WeakSet()
        """Roles that release; none of the pool without release_during_training."""
        self.engines: WeakSet[TrainingEngine] = WeakSet()
        """Engines of all roles."""

    def for_training(self) -> None:
        """Called before a training engine is used, forward passes included."""
        for holder in list(self.holders):
            holder.release_generation()

    def for_generation(self) -> None:
        """Called before a generation engine that releases takes its memory back."""
        for engine in list(self.engines):
            engine.offload()


_POOLS: dict[str, PoolMemory] = {}


def pool_memory(pool: str) -> PoolMemory:
    """The memory of the pool of this name in this process."""
    return _POOLS.setdefault(pool, PoolMemory())
