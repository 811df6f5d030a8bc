"""RankContext: what a worker knows about the process it lives in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """Handed to every worker by its host; torch.distributed's default group is the pool's world.

    RankContext(pool="main", role="actor", rank=3, world_size=8, local_rank=3, device="cpu", node="10.0.0.7")
    """

    pool: str = "main"
    role: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index of the device on its node."""
    device: str = "cpu"
    """"cpu" or "cuda:<index>"."""
    node: str = "localhost"
    num_threads: int = 1
    """CPU threads that the process may use."""
    deterministic: bool = False
    """The same calls are to give the same bits on a GPU (hybridflow/devices.py)."""
    in_ray: bool = False
    """The process belongs to a Ray cluster: work may be spread over Ray tasks. False with
    runtime=local, even where something else has connected this process to Ray."""
