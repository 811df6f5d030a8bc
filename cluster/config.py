"""The settings of how a run gets to Ray, readable where Ray is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    embedded = "embedded"
    """Started by this process, ends with it."""
    address = "address"
    """A running cluster, by cluster.address or RAY_ADDRESS."""
    job = "job"
    """The cluster that runs this process as the entry point of a submitted job."""
    joined = "joined"
    """Ray was connected before connect was called; whoever did that ends it."""


@dataclass(kw_only=True)
class ClusterConfig:
    """How the run gets to Ray: start it here, or connect to a cluster.

    ClusterConfig(address="10.0.0.1:6379")
    """

    address: str = ""
    """host:port of a running cluster, "auto" for the one on this machine, "local" to start one
    in any case; empty: RAY_ADDRESS, or embedded where that is not set."""
    dashboard: bool = False
    """Embedded: serve Ray's dashboard on http://127.0.0.1:<dashboard_port>."""
    dashboard_port: int = 8265
    """Embedded: the dashboard's port."""
    object_store_gib: float = 0.0
    """Embedded: size of the object store; 0 leaves it to Ray (30 % of the memory)."""
    working_dir: str = "."
    """By address: this directory is uploaded for the workers (its .gitignore is obeyed); empty
    when all nodes share it anyway."""
    worker_logs: bool = True
    """Print what the workers print."""
    check_timeout_s: float = 120.0
    """How long a node may take to answer the check of versions."""

    def __post_init__(self) -> None:
        if not self.check_timeout_s > 0:
            raise ValueError(f"cluster.check_timeout_s is {self.check_timeout_s}; use more than 0")
        if self.object_store_gib < 0:
            raise ValueError(
                f"cluster.object_store_gib is {self.object_store_gib}; use more than 0, or 0, which "
                "leaves it to Ray"
            )
        if not 0 < self.dashboard_port < 2**16:
            raise ValueError(
                f"cluster.dashboard_port is {self.dashboard_port}; use a port, 1 to 65535"
            )
