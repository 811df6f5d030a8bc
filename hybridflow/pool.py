"""ResourcePool: n devices of the cluster with one host process each, and one torch.distributed
world over them.

ray_pool.py takes the devices from Ray; local_pool.py has the pool that is this very process. Roles
enter a pool through spawn (group.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from hybridflow.batch import Batch
from hybridflow.calls import DEFAULT_TIMEOUT_S, Reply
from hybridflow.host_state import HostState
from hybridflow.protocols import Arguments
from hybridflow.worker import Worker

Parts = Generator[None, None, None]
"""A start or restart that can be left between its parts, while processes work."""
ENDED = object()


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """A request for devices: PoolSpec(name="main", num_devices=8, device="cuda", roles=("actor",
    "critic"))."""

    name: str = "main"
    num_devices: int = 1
    device: str = "cpu"
    """"cpu" (a device is a CPU slot) or "cuda" (a device is a GPU)."""
    node_resource: str = ""
    """Only on nodes that have this Ray resource: `accelerator_type:H100`, or one that you gave
    your nodes. Empty: on any node."""
    cpus_per_device: float = 1.0
    threads_per_device: int = 0
    """CPU threads of a host; 0: the node's cores shared among its hosts, in this process
    OMP_NUM_THREADS or all cores."""
    roles: tuple[str, ...] = ()
    """Shown in Ray's dashboard; every spawn says its role again."""
    start_timeout_s: float = 300.0
    """How long the devices, then the processes, then their connection may take."""
    collective_timeout_s: float = 900.0
    """How long an operation of the pool's process group may take; less than call_timeout_s, so
    that the ranks that wait for a lost one end by themselves and the report names the lost one."""
    call_timeout_s: float = DEFAULT_TIMEOUT_S
    """A wait ends in a report of every rank's stack when the pool finishes no call for this
    long, or for three times what the call usually takes."""
    bury_s: float = 60.0
    """How long killed processes may take to disappear and to give their device memory back."""
    deterministic: bool = False
    """On GPUs the same calls give the same bits, at the price of slower kernels."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables of the hosts."""


class ResourcePool(ABC):
    """with RayPool(PoolSpec(num_devices=2)) as pool: actor = spawn(ActorWorker, pool, config,
    role="actor")"""

    spec: PoolSpec
    broken: str = ""
    """Why the pool can't be used any more."""

    @property
    def name(self) -> str:
        """The pool's name, as placements and errors call it."""
        return self.spec.name

    @property
    def size(self) -> int:
        """The number of devices, each with a host process of its own."""
        return self.spec.num_devices

    @property
    @abstractmethod
    def role_names(self) -> tuple[str, ...]:
        """The roles that stand on it."""

    def create(self, role: str, worker_class: type[Worker], config: Any) -> None:
        """Builds the role's worker on every host."""
        self.begin_creating(role, worker_class, config)()

    @abstractmethod
    def begin_creating(
        self, role: str, worker_class: type[Worker], config: Any
    ) -> Callable[[], None]:
        """Begins to build the role's worker on every host, behind those that were begun before;
        what it returns waits until it stands."""

    @abstractmethod
    def submit(
        self,
        role: str,
        method: str,
        arguments: Sequence[Arguments],
        keep: Sequence[bool],
        num_columns: int,
    ) -> list[tuple[Any, list[Any]]]:
        """Starts the method on every rank; per rank a reference to its Reply and one for each
        column it writes."""

    @abstractmethod
    def read_replies(self, replies: Sequence[Any]) -> list[Reply]:
        """Waits for replies."""

    @abstractmethod
    def arrived(self, replies: Sequence[Any]) -> bool:
        """Whether the replies are there; does not wait."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """The batch as it may be sent to the hosts."""

    @abstractmethod
    def node(self, rank: int) -> str | None:
        """The Ray node on which a rank's host runs; None where that is this process."""

    def nodes(self) -> set[str]:
        """The Ray nodes of its hosts that are known; none where they are this process."""
        return set()

    @abstractmethod
    def pids(self) -> list[int]:
        """The process of each rank, on its node."""

    def look(self) -> Sequence[Any]:
        """Asks every host how it is, behind its calls; references to the answers. None by default:
        this process needs no witness of itself."""
        return ()

    def looked(self, answers: Sequence[Any]) -> list[HostState] | None:
        """The answers, without those of hosts that have died meanwhile; None while one is missing."""
        del answers
        return []

    @abstractmethod
    def activity(self) -> str:
        """The activity of another process of the pool, where it has a name (progress.py); for
        any thread."""

    def restart(self) -> None:
        """New processes with the same roles, in place: the pool and its handles stay the objects
        that they are. Everything that the old processes held is lost; whatever of them is still
        alive is killed. A RuntimeError where that does not succeed."""
        take_turns([self.restarting()])

    @abstractmethod
    def restarting(self) -> Parts:
        """The restart in parts, for several pools that take turns (take_turns)."""

    @abstractmethod
    def clear(self) -> None:
        """Closes the roles; the processes stay, for other roles."""

    @abstractmethod
    def close(self) -> None:
        """Ends the hosts; calling it twice is fine."""

    def _check_usable(self) -> None:
        if self.broken:
            raise RuntimeError(f"pool {self.name!r} was stopped: {self.broken}")

    def __enter__(self) -> ResourcePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def take_turns(works: Sequence[Parts]) -> None:
    """Does a part of each in turn until all have ended, so that the processes of one pool work while
    the controller waits for another's. An error in one of them ends all."""
    under_way = list(works)
    try:
        while under_way:
            under_way = [work for work in under_way if next(work, ENDED) is not ENDED]
    finally:
        for work in works:
            work.close()
