"""HostState: what a host says of itself between two steps: how fast it computes, and the memory that
its process and its container have.

HostState.of(context, probe)        # on the host
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridflow.context import RankContext
from hybridflow.out_of_memory import read_kills, read_limit, read_used

if TYPE_CHECKING:
    from hybridflow.probe import Probe

STATM = Path("/proc/self/statm")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostState:
    """HostState(pool="policy", rank=0, node="10.0.0.7", pid=4711, probe_s=0.011, cost_s=0.012,
    resident_bytes=2**30, peak_bytes=2**31, used_bytes=2**33, limit_bytes=2**34, oom_kills=0)"""

    pool: str
    rank: int
    node: str
    """Its address in the cluster."""
    pid: int
    probe_s: float
    """Seconds of the fixed work of probe.py; NaN where it could not be done."""
    cost_s: float
    """How long the look kept the host from its next call."""
    resident_bytes: int
    """Memory that its process has now."""
    peak_bytes: int
    """The most that it had so far."""
    used_bytes: int
    """Memory that its container has in use, without what the kernel can take back of files; of the
    machine where no container has a limit."""
    limit_bytes: int
    """The most that the container, or the machine, may use."""
    oom_kills: int
    """Processes of the container that the kernel has ended for want of memory so far."""

    @classmethod
    def of(cls, context: RankContext, probe: Probe) -> HostState:
        started = time.perf_counter()
        probe_s = probe.seconds()
        used, limit = read_used(), read_limit()
        return cls(
            pool=context.pool,
            rank=context.rank,
            node=context.node,
            pid=os.getpid(),
            probe_s=probe_s,
            resident_bytes=resident_bytes(),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            used_bytes=used,
            limit_bytes=limit or total_bytes(),
            oom_kills=read_kills(),
            cost_s=time.perf_counter() - started,
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM, files that it maps included; 0 on a system without
    /proc."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def total_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
