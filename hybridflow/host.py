"""Host: the process of one device. All roles of its pool live in it as plain objects and run one
call at a time.

Roles are objects with methods here. The distribution of calls is in group.py, the choice of the
process' node in pool.py.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridflow import progress
from hybridflow.batch import Batch
from hybridflow.calls import Reply
from hybridflow.columns import Block
from hybridflow.context import RankContext
from hybridflow.devices import choose_interfaces, peak_memory, repeat_results, with_device
from hybridflow.errors import (
    NotFiniteError,
    UserCodeError,
    Where,
    WorkerError,
    WorkerNotFinite,
    WorkerUserCodeError,
    WorkerValueError,
)
from hybridflow.host_state import HostState
from hybridflow.out_of_memory import read_kills, read_limit, told
from hybridflow.protocols import Arguments
from hybridflow.worker import Worker, declared_methods

if TYPE_CHECKING:
    from hybridflow.probe import Probe

NO_ARGUMENTS = Arguments()
STACK_FILES = "hybridflow-stacks-"
"""How the names of files with stacks begin; then process namespace and process id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostInfo:
    """The process and node of a host."""

    rank: int
    pid: int
    node_id: str
    """Ray's id of the node ("" in local mode)."""
    address: str
    stack_file: str
    oom_kills: int
    """Processes of its node that had been killed for want of memory when it started."""
    activity_file: str
    """The host's present activity (progress.read)."""


def out_of_memory(kills_before: int) -> str:
    """On a host's node: what the kernel's out-of-memory killer has done since (told)."""
    return told(kills_before, read_kills(), read_limit())


class Host:
    """host = Host(context); port = host.open_store("127.0.0.1", 60.0)      # on rank 0
    host.join("127.0.0.1", port, 60.0); host.create("actor", ActorWorker, config)
    reply, *blocks = host.call(Arguments((batch,)))     # as a Ray task named "actor.compute_log_prob"
    """

    def __init__(self, context: RankContext, node_id: str = "", roles: str = "") -> None:
        """`roles`: names for Ray's dashboard, which shows the host before it has any role."""
        self.context = with_device(context)
        self.roles = roles
        self.node_id = node_id
        self.workers: dict[str, Worker] = {}
        self.store: Any = None
        """torch.distributed's store of the pool's world; rank 0's listens."""
        self.probe: Probe | None = None
        self.stack_file = _write_stacks_on_signal()
        self.activity_file = f"{self.stack_file.name}.activity"
        progress.write_to(Path(self.activity_file))

    def info(self) -> HostInfo:
        return HostInfo(
            rank=self.context.rank,
            pid=os.getpid(),
            node_id=self.node_id,
            address=self.context.node,
            stack_file=self.stack_file.name,
            activity_file=self.activity_file,
            oom_kills=read_kills(),
        )

    def open_store(self, address: str, timeout_s: float) -> int:
        """On rank 0: opens the store at which the ranks find each other, and returns its port. The
        socket is bound here and stays open, so that no other process can take the port."""
        import torch.distributed as dist

        self.store = dist.TCPStore(
            address,
            0,
            self.context.world_size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        return int(self.store.port)

    def join(self, master_address: str, master_port: int, timeout_s: float) -> None:
        """Enters the pool's torch.distributed world. Collective over the hosts."""
        import torch
        import torch.distributed as dist

        context = self.context
        timeout = timedelta(seconds=timeout_s)
        os.environ.update(
            RANK=str(context.rank),
            WORLD_SIZE=str(context.world_size),
            LOCAL_RANK=str(context.local_rank),
            MASTER_ADDR=master_address,
            MASTER_PORT=str(master_port),
        )
        choose_interfaces(context, one_machine=master_address == "127.0.0.1")
        torch.set_num_threads(context.num_threads)
        if context.deterministic:
            repeat_results()
        if context.device.startswith("cuda"):
            torch.cuda.set_device(context.device)
        backend = "cpu:gloo,cuda:nccl" if context.device.startswith("cuda") else "gloo"
        if self.store is None:
            self.store = dist.TCPStore(
                master_address, master_port, context.world_size, is_master=False, timeout=timeout
            )
        dist.init_process_group(
            backend,
            store=self.store,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timeout,
        )

    def create(self, role: str, worker_class: type[Worker], config: Any) -> Reply:
        """Builds the role's worker. Collective over the hosts."""
        started = time.time()
        with _named_failure(self.context, role, "__init__"):
            self.workers[role] = worker_class(config, replace(self.context, role=role))
        return Reply(started=started, finished=time.time())

    def call(self, arguments: Arguments = NO_ARGUMENTS, keep: bool = True) -> Any:
        """Runs the role's method that this task is named after.

        Returns a Reply (packed), followed by a block for each column that the method writes (None
        where keep is false).
        """
        # Ray shows tasks by this name, and a call without arguments costs a third less than one
        # with any.
        role, _, method = _task_name().rpartition(".")
        with _named_failure(self.context, role, method):
            worker = self.workers[role]
            declaration = declared_methods(type(worker), worker.config)[method]
            local = arguments.map_batches(
                lambda batch: batch.local(batch.columns, self.node_id or None)
            )
            # The inputs have arrived: waiting for them is not part of the call.
            started = time.time()
            result = getattr(worker, method)(*local.args, **local.kwargs)
            reply = Reply(
                started=started,
                finished=time.time(),
                peak_bytes=peak_memory(self.context.device),
            )
            if not declaration.writes:
                return replace(reply, result=result if keep else None).packed()
            if not keep:
                return reply.packed(), *([None] * len(declaration.writes))
            blocks = written_blocks(method, result, declaration.writes, local)
            reply = replace(reply, finished=time.time(), num_rows=len(result))
            return reply.packed(), *blocks

    def look(self) -> HostState:
        """How the host is, between two steps. No collective."""
        if self.probe is None:
            from hybridflow.probe import Probe

            self.probe = Probe(self.context.device)
        return HostState.of(self.context, self.probe)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def __repr__(self) -> str:
        return f"{self.context.pool}/{self.context.rank} {self.roles or '+'.join(self.workers)}"


def written_blocks(
    method: str, result: Any, writes: Sequence[str], arguments: Arguments
) -> list[Block]:
    """The columns that a method returned, in the order in which it declares them; a ValueError for
    others, and for another number of rows than it got."""
    if not isinstance(result, Batch) or set(result.columns) != set(writes):
        have = sorted(result.columns) if isinstance(result, Batch) else type(result).__name__
        raise ValueError(
            f"{method} declares writes={list(writes)} but returned {have}; return Batch.of with "
            "these columns"
        )
    num_rows = set(map(len, arguments.batches()))
    if num_rows and len(result) not in num_rows:
        raise ValueError(
            f"{method} got {max(num_rows)} rows and returned {len(result)}; it must return one "
            "row for each, in order"
        )
    return result.blocks(writes)


def _task_name() -> str:
    import ray

    return str(ray.get_runtime_context().get_task_name())


class _named_failure:
    """The process boundary: an exception leaves with role, rank, method and traceback; an
    exception that another call raised passes unchanged."""

    def __init__(self, context: RankContext, role: str, method: str) -> None:
        self.where = Where(
            role=role,
            rank=context.rank,
            method=method,
            pool=context.pool,
            node=context.node,
            pid=os.getpid(),
        )

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if error is None or not isinstance(error, Exception):
            return
        upstream = getattr(error, "cause", None)
        if isinstance(upstream, WorkerError):
            raise upstream
        cause = f"{type(error).__name__}: {error}"
        remote_traceback = "".join(traceback.format_exception(error))
        raise _error_class(error)(self.where, cause, remote_traceback) from None


def _error_class(error: Exception) -> type[WorkerError]:
    """The class under which an exception leaves the process."""
    if isinstance(error, ValueError):
        return WorkerValueError
    if isinstance(error, NotFiniteError):
        return WorkerNotFinite
    return WorkerUserCodeError if isinstance(error, UserCodeError) else WorkerError


def _write_stacks_on_signal() -> IO[str]:
    """SIGUSR1 writes every thread's stack to a file, also while the process is stuck in native
    code. Files of processes that were killed are removed on this occasion: nobody else knows of
    those whose controller died with them."""
    remove_stack_files()
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115
        "w",
        prefix=f"{STACK_FILES}{_process_namespace()}-{os.getpid()}-",
        suffix=".txt",
        delete=False,
    )
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    return file


def remove_stack_files() -> None:
    """Removes what dead processes of this user and process namespace (container) left; nothing on
    a system without /proc."""
    if not _process_namespace():
        return
    for path in Path(tempfile.gettempdir()).glob(f"{STACK_FILES}*"):
        namespace, pid = path.name.removeprefix(STACK_FILES).split("-")[:2]
        if namespace == _process_namespace() and not Path(f"/proc/{pid}").exists():
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _process_namespace() -> str:
    """The number of the namespace that process ids belong to: containers may share a directory."""
    try:
        return Path("/proc/self/ns/pid").readlink().name.removeprefix("pid:").strip("[]")
    except OSError:
        return ""


def read_stacks(pid: int, stack_file: str, wait_s: float = 3.0) -> str:
    """The stacks of a process of this node; its state where it does not answer."""
    path = Path(stack_file)
    try:
        before = path.stat().st_size
        os.kill(pid, signal.SIGUSR1)
    except (ProcessLookupError, FileNotFoundError):
        return "(the process is gone)"
    deadline = time.monotonic() + wait_s
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = path.stat().st_size
        if now > before and now == size:
            return path.read_text()[before:]
        size = now
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "(the process is gone)"
    state = "State: unknown"
    for line in status.splitlines():
        if line.startswith("State:"):
            state = line
    return f"(did not answer within {wait_s:.0f} s; {state})"
