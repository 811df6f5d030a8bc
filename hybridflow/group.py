"""spawn: a worker on every device of a pool, behind a handle that has the worker's own type.

A call on the handle is distributed and collected by the method's protocol and returns at once. A Batch,
Metrics or a list fills in when it is read; for anything else (a number, a string) the call waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, get_type_hints

import numpy as np

from hybridflow.batch import Batch, ColumnEntry, RowRange
from hybridflow.columns import declared
from hybridflow.pool import ResourcePool
from hybridflow.progress import activity
from hybridflow.protocols import Arguments, Distribution, _as_list
from hybridflow.results import Metrics, Results
from hybridflow.worker import Remote, Worker, remote_methods

LOGGER = logging.getLogger(__name__)
W = TypeVar("W", bound=Worker)


def spawn(worker_class: type[W], pool: ResourcePool, config: Any, *, role: str = "") -> W:
    """Builds the worker on every host of the pool; returns when it stands.

    critic = spawn(CriticWorker, pool, config, role="critic")
    critic.compute_values(batch)          # checked by mypy as CriticWorker.compute_values
    """
    return cast(
        W, Handle(worker_class, pool, config, role or worker_class.__name__.removesuffix("Worker").lower())
    )


class Handle:
    """The controller's side of a worker group. Only declared methods exist on it."""

    def __init__(self, worker_class: type[Worker], pool: ResourcePool, config: Any, role: str) -> None:
        self._layouts = worker_class.layouts(config, pool.size)
        for name, layout in self._layouts.items():
            if layout.size != pool.size:
                raise ValueError(
                    f"{role}: its {name} layout {layout} is for {layout.size} devices, pool {pool.name!r} "
                    f"has {pool.size}; "
                    f"change the parallel sizes so that their product is {pool.size}"
                )
        self._pool = pool
        self._role = role
        self._worker_class = worker_class
        self._methods = remote_methods(worker_class)
        self._returns_metrics = {
            name: get_type_hints(getattr(worker_class, name)).get("return") is Metrics
            for name in self._methods
        }
        started = time.perf_counter()
        with activity(f"building {role}", detail=pool.activity):
            pool.create(role, worker_class, config)
        LOGGER.info(
            "%s: built on pool %s (%d devices) in %.1f s",
            role,
            pool.name,
            pool.size,
            time.perf_counter() - started,
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._methods:
            known = ", ".join(sorted(self.__dict__.get("_methods", ())))
            raise AttributeError(
                f"{self.__dict__.get('_role', 'handle')}: no remote method {name!r}; it has {known}"
            )
        declaration = self._methods[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, declaration, Arguments(args, kwargs))

        # The next call finds it without coming here.
        self.__dict__[name] = call
        return call

    def __repr__(self) -> str:
        return f"{self._role} ({self._worker_class.__name__} on pool {self._pool.name!r}, {self._pool.size} devices)"

    def _call(self, method: str, declaration: Remote, arguments: Arguments) -> Any:
        protocol = declaration.protocol
        layout = self._layouts[protocol.layout]
        rows: Sequence[np.ndarray] | None = None
        if arguments.args or arguments.kwargs:
            arguments = arguments.map_batches(lambda batch: self._needed(batch, method, declaration))
            distribution: Distribution = protocol.distribute(layout, arguments, declaration.split)
            given, rows = distribution.arguments, distribution.rows
        else:
            given = [arguments] * layout.size
        collected = list(protocol.collected(layout))
        keep = [False] * layout.size
        for rank in collected:
            keep[rank] = True
        calls = self._pool.submit(self._role, method, given, keep, len(declaration.writes))
        if declaration.writes:
            return self._collect_batches(declaration, [(rank, *calls[rank]) for rank in collected], rows)
        replies = [calls[rank][0] for rank in collected]

        def read() -> Any:
            return protocol.collect(layout, [reply.result for reply in self._pool.read_replies(replies)])

        if self._returns_metrics[method] and protocol.collect is not _as_list:
            return Metrics(sources=[read])
        return Results(read) if protocol.collect is _as_list else read()

    def _needed(self, batch: Batch, method: str, declaration: Remote) -> Batch:
        """The columns that the method declares, in a form that may be sent."""
        missing = [name for name in declaration.reads if name not in batch]
        if missing:
            raise ValueError(
                f"{self._role}.{method} reads {missing}, which the batch lacks; it has "
                f"{', '.join(batch.columns) or 'none'}"
            )
        split = declaration.split
        used = (
            *declaration.optional,
            *(name for name in (split.balance, split.within, split.together) if name),
        )
        wanted = dict.fromkeys((*declaration.reads, *(name for name in used if name in batch)))
        return self._pool.prepare(batch.select(*wanted))

    def _collect_batches(
        self,
        declaration: Remote,
        calls: Sequence[tuple[int, Any, list[Any]]],
        rows: Sequence[np.ndarray] | None,
    ) -> Batch:
        if rows is None:
            # The protocol says nothing of rows (a user's own, ONE_TO_ALL): only the replies tell how many
            # there are.
            counts = [
                reply.num_rows or 0 for reply in self._pool.read_replies([reply for _, reply, _ in calls])
            ]
        else:
            counts = [len(rows[rank]) for rank, _, _ in calls]
        results = []
        for (rank, _, columns), count in zip(calls, counts, strict=True):
            everything = np.arange(count)
            entries = {
                name: ColumnEntry(declared(name), (RowRange(ref, count, self._pool.node(rank)),), everything)
                for name, ref in zip(declaration.writes, columns, strict=True)
            }
            results.append(Batch(entries, count))
        layout = self._layouts[declaration.protocol.layout]
        batch = declaration.protocol.collect(layout, results)
        if rows is None or not isinstance(batch, Batch):
            return cast(Batch, batch)
        positions = np.concatenate([rows[rank] for rank, _, _ in calls])
        return batch if (np.diff(positions) > 0).all() else batch.rows(np.argsort(positions, kind="stable"))
