"""spawn: a worker on every device of a pool, behind a handle that has the worker's own type.

A call on the handle is distributed and collected by the method's protocol. What it returns is of
the type that the method declares:

    batch = actor.generate_sequences(prompts)       # Batch, Metrics: returned at once, filled in when read
    actor.save_pretrained("out")                    # None: returns when every rank is done
    each(actor.peak_memory_bytes)                   # a value of every rank: each() waits for all, list[int]
    saving = start(actor.save_checkpoint, "at")     # the same without waiting: Results[None]; saving.wait()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

import numpy as np

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.pool import ResourcePool
from hybridflow.progress import activity
from hybridflow.protocols import Arguments, Distribution
from hybridflow.results import Metrics, Results
from hybridflow.worker import Remote, Worker, declared_methods

LOGGER = logging.getLogger(__name__)
W = TypeVar("W", bound=Worker)
ConfigT = TypeVar("ConfigT")
P = ParamSpec("P")
R = TypeVar("R")


def spawn(
    worker_class: Callable[[ConfigT, RankContext], W],
    pool: ResourcePool,
    config: ConfigT,
    *,
    role: str = "",
) -> W:
    """Builds the worker, a class, on every host of the pool; returns when it stands.

    critic = spawn(CriticWorker, pool, CriticConfig(...), role="critic")   # another config is a type error
    critic.compute_values(batch)          # checked by mypy as CriticWorker.compute_values
    """
    if not (isinstance(worker_class, type) and issubclass(worker_class, Worker)):
        raise ValueError(
            f"spawn: {worker_class!r} is not a subclass of Worker; give a worker's class"
        )
    if not isinstance(pool, ResourcePool):
        raise ValueError(
            f"spawn: {pool!r} is no pool; give the one of `with LocalPool() as pool:` or "
            "`with RayPool(...) as pool:`"
        )
    _check_config(worker_class, config)
    name = role or worker_class.__name__.removesuffix("Worker").lower()
    handle = Handle(worker_class, pool, config, name)
    handle.wait_until_built()
    return cast(W, handle)


def spawn_all(
    roles: Mapping[str, tuple[type[Worker], ResourcePool, Any]],
) -> dict[str, Any]:
    """Builds roles by name, given their worker, pool and settings; pools work at the same time.
    Returns when all stand."""
    handles = {}
    for name, (worker_class, pool, config) in roles.items():
        handles[name] = Handle(worker_class, pool, config, name)
    for handle in handles.values():
        handle.wait_until_built()
    return dict(handles)


def _check_config(worker_class: type[Worker], config: object) -> None:
    """A ValueError for settings of another class than the worker's __init__ declares."""
    try:
        takes = get_type_hints(worker_class.__init__).get("config")
    except NameError:  # a name that only a type checker knows
        return
    if isinstance(takes, type) and takes is not Any and not isinstance(config, takes):
        wrong = (
            f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        )
        raise ValueError(
            f"spawn: {worker_class.__name__} takes settings of class {takes.__name__}, not {wrong}; "
            f"give {takes.__name__}(...)"
        )


def start(method: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Results[R]:
    """Starts a call that every rank answers; the answers are there when they are read.

    A method of a plain object in this process is called at once and counts as the only rank.
    """
    if isinstance(method, RemoteMethod):
        return method.start(*args, **kwargs)
    answer = method(*args, **kwargs)
    return Results(lambda: [answer])


def each(method: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
    """The answers of every rank, in rank order; waits for all of them."""
    return list(start(method, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A call that was started on every rank."""

    collect: Callable[[], Any]
    """Its result: batches at once, since they are references; values when they are there."""
    arrived: Callable[[], bool]
    """Whether values are there."""


class RemoteMethod:
    """One declared method of a worker group, ready to be called."""

    def __init__(
        self,
        begin: Callable[[Arguments], UnderWay],
        name: str,
        declaration: Remote,
        returns: object,
    ) -> None:
        self._begin = begin
        self._name = name
        self._declaration = declaration
        self._returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._declaration.protocol.every_rank and self._returns is not NoneType:
            raise TypeError(
                f"{self._name} is answered by every rank; call each({self._name}, ...) for the "
                "list of the answers"
            )
        collect = self._begin(Arguments(args, kwargs)).collect
        if self._returns is Metrics and not self._declaration.writes:
            return Metrics(sources=[collect])
        result = collect()
        return None if self._returns is NoneType else result

    def start(self, *args: Any, **kwargs: Any) -> Results[Any]:
        """See the function start."""
        if not self._declaration.protocol.every_rank:
            raise TypeError(f"{self._name} has one answer, not one of every rank; call it")
        call = self._begin(Arguments(args, kwargs))
        return Results(call.collect, call.arrived)


class Handle:
    """The controller's side of a worker group. Only declared methods exist on it."""

    def __init__(
        self, worker_class: type[Worker], pool: ResourcePool, config: Any, role: str
    ) -> None:
        if role in pool.role_names:
            raise ValueError(
                f"spawn: pool {pool.name!r} has a role {role!r} already; give this one another "
                "name (role=...)"
            )
        self._layouts = worker_class.layouts(config, pool.size)
        for name, layout in self._layouts.items():
            if layout.size != pool.size:
                raise ValueError(
                    f"{role}: its {name} layout {layout} is for {layout.size} devices, pool "
                    f"{pool.name!r} has {pool.size}; change the parallel sizes so that their "
                    f"product is {pool.size}"
                )
            self._warn_of_torn_groups(role, name, layout, pool)
        self._pool = pool
        self._role = role
        self._worker_class = worker_class
        self._methods = declared_methods(worker_class, config)
        self._begun = time.perf_counter()
        self._wait = pool.begin_creating(role, worker_class, config)

    def wait_until_built(self) -> None:
        """Returns when the worker stands on every host."""
        pool = self._pool
        with activity(f"building {self._role}", detail=pool.activity):
            self._wait()
        LOGGER.info(
            "%s: built on pool %s (%d devices) in %.1f s",
            self._role,
            pool.name,
            pool.size,
            time.perf_counter() - self._begun,
        )

    @staticmethod
    def _warn_of_torn_groups(role: str, name: str, layout: Layout, pool: ResourcePool) -> None:
        nodes = [pool.node(rank) or "" for rank in range(pool.size)]
        group = layout.torn("tp", nodes)
        if group:
            parts = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in group)
            LOGGER.warning(
                "%s: a tensor-parallel group of its %s layout lies on several nodes (%s), which is "
                "slow; free whole nodes for pool %s (pools.%s.num_devices=%d), or use fewer "
                "devices",
                role,
                name,
                parts,
                pool.name,
                pool.name,
                pool.size,
            )

    def __getattr__(self, name: str) -> RemoteMethod:
        if name.startswith("_") or name not in self._methods:
            known = ", ".join(sorted(self.__dict__.get("_methods", ())))
            known = known or "none; mark its methods with @remote"
            raise AttributeError(
                f"{self.__dict__.get('_role', 'handle')}: no remote method {name!r}; it has {known}"
            )
        declaration = self._methods[name]
        # The RPC layer looks methods up by name.
        returns = get_type_hints(getattr(self._worker_class, name)).get("return")
        begin = partial(self._begin, name, declaration)
        method = RemoteMethod(begin, f"{self._role}.{name}", declaration, returns)
        # The next call finds it without coming here.
        self.__dict__[name] = method
        return method

    def __repr__(self) -> str:
        pool = f"pool {self._pool.name!r}, {self._pool.size} devices"
        return f"{self._role} ({self._worker_class.__name__} on {pool})"

    def _begin(self, method: str, declaration: Remote, arguments: Arguments) -> UnderWay:
        """Starts the call on every rank."""
        if declaration.reads and not arguments.batches():
            values = (*arguments.args, *arguments.kwargs.values())
            passed = ", ".join(type(value).__name__ for value in values) or "nothing"
            raise ValueError(
                f"{self._role}.{method} takes a Batch with the columns "
                f"{', '.join(declaration.reads)}; it was called with {passed}"
            )
        protocol = declaration.protocol
        layout = self._layouts[protocol.layout]
        rows: Sequence[np.ndarray] | None = None
        if arguments.args or arguments.kwargs:
            arguments = arguments.map_batches(
                lambda batch: self._needed(batch, method, declaration)
            )
            distribution: Distribution = protocol.distribute(layout, arguments, declaration.split)
            sent, rows = distribution.arguments, distribution.rows
        else:
            sent = [arguments] * layout.size
        collected = list(protocol.collected(layout))
        keep = [False] * layout.size
        for rank in collected:
            keep[rank] = True
        calls = self._pool.submit(self._role, method, sent, keep, len(declaration.writes))
        if declaration.writes:
            written = [(rank, *calls[rank]) for rank in collected]
            return UnderWay(lambda: self._collect_batches(declaration, written, rows), lambda: True)
        replies = [calls[rank][0] for rank in collected]
        return UnderWay(
            lambda: protocol.collect(
                layout, [reply.result for reply in self._pool.read_replies(replies)]
            ),
            lambda: self._pool.arrived(replies),
        )

    def _needed(self, batch: Batch, method: str, declaration: Remote) -> Batch:
        """The columns that the method declares, in a form that may be sent."""
        missing = batch.missing(declaration.reads)
        if missing:
            raise ValueError(
                f"{self._role}.{method} reads {missing}, which the batch lacks; it has "
                f"{', '.join(batch.columns) or 'none'}"
            )
        split = declaration.split
        names = dict.fromkeys(declaration.reads)
        columns = (split.balance, split.within, split.together, split.near)
        for name in (*declaration.optional, *columns):
            if name is not None and name in batch:
                names[name] = None
        return self._pool.prepare(batch.select(*names))

    def _collect_batches(
        self,
        declaration: Remote,
        calls: Sequence[tuple[int, Any, list[Any]]],
        rows: Sequence[np.ndarray] | None,
    ) -> Batch:
        if rows is None:
            # The protocol says nothing of rows (a user's own, ONE_TO_ALL): only the replies tell
            # how many there are.
            replies = self._pool.read_replies([reply for _, reply, _ in calls])
            counts = [reply.num_rows or 0 for reply in replies]
        else:
            counts = [len(rows[rank]) for rank, _, _ in calls]
        results = []
        for (rank, _, columns), count in zip(calls, counts, strict=True):
            refs = dict(zip(declaration.writes, columns, strict=True))
            results.append(Batch.of_refs(refs, count, self._pool.node(rank)))
        layout = self._layouts[declaration.protocol.layout]
        batch = declaration.protocol.collect(layout, results)
        if rows is None or not isinstance(batch, Batch):
            return cast(Batch, batch)
        positions = np.concatenate([rows[rank] for rank, _, _ in calls])
        if (np.diff(positions) > 0).all():
            return batch
        return batch.rows(np.argsort(positions, kind="stable"))
