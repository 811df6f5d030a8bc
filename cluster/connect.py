"""connect: the one way into Ray, whether it is to be started here, runs elsewhere, or started this
process.

    with connect(ClusterConfig(), cpu_slots=2) as cluster:
        print(cluster.describe())
        with RayPool(PoolSpec(num_devices=2)) as pool: ...

CPU slots. A pool of n CPU devices takes n of Ray's CPU resource, one host process each. Embedded
Ray is started with one slot per host and one more per core for tasks (reward functions), however
few cores there are: a slot is bookkeeping, the threads of a host are set by its pool. An existing
cluster is taken as it is: give its nodes slots with `ray start --num-cpus`, or let a host take a
fraction (cpus_per_device).

Embedded Ray listens on the loopback interface only, and its token authentication is on.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray._private import ray_constants, services, worker
from ray._private.node import Node
from ray.exceptions import AuthenticationError, RayError

from cluster.config import ClusterConfig, Mode
from cluster.nodes import NodeInfo, check_accelerators, check_nodes, probe, probe_nodes, table
from hybridflow.progress import activity

LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0: Ray's nodes take 127.0.0.1 for their address and listen there only. Ray's default on
laptops' systems, not on Linux."""
SYSTEM_CONFIG = {"free_objects_period_milliseconds": 0, "prestart_worker_first_driver": False}
"""Settings of embedded Ray that have no argument.

Memory of columns that nobody holds is free at once. Ray's default collects them for a second, in
which every step writes into fresh pages; the kernel's clearing of pages then takes longer than the
copies themselves (a 24 MB batch: 47 ms instead of 17).

No processes are started before they are needed. Ray's default is one per CPU slot at the start of
the first driver, ahead of the hosts, which can't use them: they have an environment of their own."""
JOB_MARKER = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the entry point of a submitted job."""
LOOPBACK = ("127.0.0.1", "localhost")
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """A connection; leaving the `with` block ends it, and the cluster too if it is embedded."""

    mode: Mode
    address: str
    """host:port of the head."""
    dashboard: str
    """URL of Ray's dashboard; empty where there is none."""
    nodes: tuple[NodeInfo, ...]

    @property
    def num_cpu_slots(self) -> float:
        return sum(node.num_cpu_slots for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        return sum(node.num_gpus for node in self.nodes)

    @property
    def metrics_endpoints(self) -> tuple[str, ...]:
        """URLs that Prometheus scrapes, one per node."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        ports = {node["NodeID"]: node["MetricsExportPort"] for node in nodes}
        return tuple(f"http://{node.address}:{ports[node.node_id]}/metrics" for node in self.nodes)

    def describe(self) -> str:
        """Where this is connected and one line per node."""
        dashboard = f", dashboard {self.dashboard}" if self.dashboard else ""
        return (
            f"Ray {ray.__version__} ({self.mode}) at {self.address}{dashboard}\n{table(self.nodes)}"
        )

    def shutdown(self) -> None:
        """End the connection unless it was joined; called again it does nothing."""
        if self.mode is not Mode.joined and ray.is_initialized():
            ray.shutdown()

    def __enter__(self) -> ClusterInfo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


def connect(
    config: ClusterConfig | None = None,
    *,
    cpu_slots: float = 0,
    gpus: float = 0,
    nodes_chosen: bool = False,
) -> ClusterInfo:
    """Connect, check every node, and make sure that the cluster has what the run's pools need
    together.

    `cpu_slots`: devices x cpus_per_device, and a slot for each of episode.processes; `gpus`: CUDA devices.
    `nodes_chosen`: every pool says which type of GPU it takes, so that nodes may have several.
    Called again (or where Ray is connected already) it joins that connection. Raises a ValueError
    for what does not fit (versions, too few devices, a wrong address) and a RuntimeError where
    nodes do not answer.
    """
    config = config or ClusterConfig()
    mode = _mode(config)
    if mode is Mode.embedded:
        with activity("starting Ray"):
            _start_embedded(config, cpu_slots)
    elif mode is not Mode.joined:
        with activity("connecting to Ray"):
            _connect_to(config, mode)
    try:
        with activity("checking the nodes"):
            nodes = probe_nodes(config.check_timeout_s)
            check_nodes(nodes, probe())
            if gpus and not nodes_chosen:
                check_accelerators(nodes)
        context = ray.get_runtime_context()
        info = ClusterInfo(
            mode=mode, address=context.gcs_address, dashboard=_dashboard_url(), nodes=nodes
        )
        _check_size(info, cpu_slots, gpus)
    except BaseException:
        if mode is not Mode.joined:
            ray.shutdown()
        raise
    return info


def _mode(config: ClusterConfig) -> Mode:
    if ray.is_initialized():
        return Mode.joined
    if config.address == "local":
        return Mode.embedded
    if JOB_MARKER in os.environ:
        return Mode.job
    return Mode.address if config.address or os.environ.get("RAY_ADDRESS") else Mode.embedded


def _start_embedded(config: ClusterConfig, cpu_slots: float) -> None:
    # Announces at every start that token authentication is on, which it is meant to be.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
        logging.ERROR
    )
    with _loopback_only(), _needed_processes(dashboard=config.dashboard):
        ray.init(
            address="local",
            num_cpus=embedded_slots(cpu_slots),
            include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=config.dashboard_port if config.dashboard else None,
            object_store_memory=int(config.object_store_gib * 2**30) or None,
            log_to_driver=config.worker_logs,
            logging_level=logging.WARNING,
            _system_config=SYSTEM_CONFIG,
        )


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's processes started inside take 127.0.0.1 for their address; Ray has no documented
    argument for it."""
    before = os.environ.get(LOOPBACK_SWITCH), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK_SWITCH] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = (
        False  # for this one, which read the variable when it imported Ray
    )
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[LOOPBACK_SWITCH]
        else:
            os.environ[LOOPBACK_SWITCH] = before[0]


@contextmanager
def _needed_processes(*, dashboard: bool) -> Iterator[None]:
    """Ray started inside has no autoscaler, and without `dashboard` no server for one, which would
    report Ray's usage and serve nothing: 50 and 75 MB. Ray has no argument for either."""
    before = Node.start_monitor, Node.start_api_server
    Node.start_monitor = _start_nothing  # type: ignore[method-assign]
    if not dashboard:
        Node.start_api_server = _start_nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Node.start_monitor, Node.start_api_server = before  # type: ignore[method-assign]


def _start_nothing(*_: object, **__: object) -> None:
    """In place of a process that Ray starts."""


def embedded_slots(cpu_slots: float) -> int:
    """Slots of embedded Ray: what the pools take, and one per core for tasks beside them."""
    return -int(-cpu_slots // 1) + (os.cpu_count() or 1)


def _connect_to(config: ClusterConfig, mode: Mode) -> None:
    requested, setting = config.address, "cluster.address"
    if mode is Mode.job:
        requested = "auto"
    elif not requested:
        requested, setting = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    address, loopback = _resolve(requested, setting)
    options: dict[str, Any] = {}
    if mode is Mode.address and config.working_dir:
        # A submitted job brings its working directory; here the workers get this one.
        options["runtime_env"] = {"working_dir": str(Path(config.working_dir).absolute())}
    try:
        with _loopback_only() if loopback else nullcontext():
            ray.init(
                address=address,
                log_to_driver=config.worker_logs,
                logging_level=logging.WARNING,
                **options,
            )
    except AuthenticationError as error:
        raise ValueError(
            f"{setting}: {address} wants a token; {TOKEN} ({_one_line(error)})"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ValueError(_refusal(setting, address, config.working_dir, error)) from error


TOKEN = (
    "copy ~/.ray/auth_token from the head, or set RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token here"
)
"""How a process is let into a cluster with tokens."""


def _refusal(setting: str, address: str, working_dir: str, error: Exception) -> str:
    """One line with what to do about a cluster that answers and can't be joined."""
    reason = _one_line(error)
    if "exceeds the maximum size" in reason:
        return (
            f"cluster.working_dir={working_dir!r} is larger than Ray uploads ({reason}); list its "
            "large folders in .gitignore or .rayignore, start from a smaller directory, or set "
            "cluster.working_dir='' where all nodes share it"
        )
    if "Version mismatch" in reason:
        return (
            f"{setting}: the cluster at {address} has another Ray or Python ({reason}); use the "
            "same versions on all nodes and here"
        )
    advice = "see whether that is the port of a Ray head (6379, not the dashboard's 8265)"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        advice = f"if its head was started with RAY_AUTH_MODE=token, {TOKEN}; else {advice}"
    return f"{setting}: cannot join the Ray cluster at {address} ({reason}); {advice}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _resolve(requested: str, setting: str) -> tuple[str, bool]:
    """host:port to connect to, and whether the head listens on loopback only; `setting` says
    who asked for it.

    Ray turns 127.0.0.1 into the machine's address, where such a head does not listen, and then
    waits for a minute.
    """
    if "://" in requested:
        raise ValueError(
            f"{setting}: {requested!r} is an address of Ray's client or dashboard, and a run joins "
            "the cluster itself; write host:port of its head (6379), or submit a job: ray job "
            "submit --address http://HOST:8265 --working-dir . -- python -m recipes...."
        )
    try:
        address = (
            services.get_ray_address_from_environment("auto", None)
            if requested == "auto"
            else requested
        )
        candidates = (services.canonicalize_bootstrap_address(address), address) if address else ()
    except ConnectionError:
        candidates = ()
    except ValueError as error:
        raise ValueError(
            f"{setting}: {requested!r} is not an address; write host:port, auto or local ({error})"
        ) from error
    for candidate in candidates:
        if candidate and _answers(candidate):
            return candidate, candidate.rpartition(":")[0] in LOOPBACK
    leave = "leave it empty"
    if setting == "RAY_ADDRESS":
        leave = "unset RAY_ADDRESS, or set cluster.address=local,"
    raise ValueError(
        f"{setting}: no Ray cluster answers at {requested!r}; start one with `ray start --head`, "
        f"correct it, or {leave} to start one here"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _dashboard_url() -> str:
    url = worker.get_dashboard_url()  # type: ignore[no-untyped-call]
    return f"http://{url}" if url else ""


def _check_size(info: ClusterInfo, cpu_slots: float, gpus: float) -> None:
    if info.num_gpus < gpus:
        raise ValueError(
            f"cluster: the pools need {gpus:g} GPUs, the cluster has {info.num_gpus:g}; use fewer "
            "devices or device=cpu"
        )
    if info.num_cpu_slots < cpu_slots:
        raise ValueError(
            f"cluster: the run needs {cpu_slots:g} CPU slots, the cluster has "
            f"{info.num_cpu_slots:g}; start its nodes with `ray start --num-cpus=...`, use fewer "
            "devices, or lower cpus_per_device or episode.processes"
        )
