"""Worker: the base of every role, and @remote, which says how a method is called from the
controller.

A worker is a plain object inside a host process. It may be built and called by hand in a test or
under a debugger: @remote adds a declaration and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from hybridflow.columns import declared
from hybridflow.context import RankContext
from hybridflow.dataflow import CallKind
from hybridflow.layout import Layout
from hybridflow.protocols import Protocol, Split

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """The declaration of a method by @remote."""

    protocol: Protocol
    reads: tuple[str, ...]
    optional: tuple[str, ...]
    writes: tuple[str, ...]
    kind: CallKind
    split: Split


DECLARATION = "__hybridflow_remote__"


def remote(
    protocol: Protocol,
    *,
    reads: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    kind: CallKind = CallKind.inference,
    balance: str | None = None,
    within: str | None = None,
    together: str | None = None,
    near: str | None = None,
    part: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares a method callable from the controller.

    reads: columns that the method needs; optional: columns that it also reads where the batch has
    them; only these reach it. writes: columns of the Batch that it returns, one row for every row
    it got, in the same order. balance, within, together, near, part: see protocols.Split.
    """
    for name in (*reads, *optional, *writes):
        declared(name)
    declaration = Remote(
        protocol=protocol,
        reads=reads,
        optional=optional,
        writes=writes,
        kind=kind,
        split=Split(balance=balance, within=within, together=together, near=near, part=part),
    )

    def mark(method: Callable[P, R]) -> Callable[P, R]:
        setattr(method, DECLARATION, declaration)
        return method

    return mark


_KNOWN_METHODS: dict[type, dict[str, Remote]] = {}


def remote_methods(worker: type) -> dict[str, Remote]:
    """The declared methods of a class by name, inherited ones included; an override keeps its
    base's declaration."""
    if worker in _KNOWN_METHODS:
        return _KNOWN_METHODS[worker]
    methods = _KNOWN_METHODS[worker] = {}
    for base in reversed(worker.__mro__):
        for name, member in vars(base).items():
            if hasattr(member, DECLARATION):
                methods[name] = getattr(member, DECLARATION)
    return methods


def declared_methods(worker: type[Worker], config: Any) -> dict[str, Remote]:
    """The declared methods of a worker with these settings, with the columns of further_writes."""
    methods = dict(remote_methods(worker))
    for name, columns in worker.further_writes(config).items():
        for column in columns:
            declared(column)
        methods[name] = replace(methods[name], writes=(*methods[name].writes, *columns))
    return methods


class Worker:
    """class ActorWorker(Worker):
        @remote(THREE_D, reads=("prompt_ids", "response_ids"), writes=("log_probs",))
        def compute_log_prob(self, batch: Batch) -> Batch: ...

    actor = spawn(ActorWorker, pool, config, role="actor")
    """

    def __init__(self, config: Any, context: RankContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def layouts(cls, config: Any, world_size: int) -> dict[str, Layout]:
        """The named layouts over the pool that the protocols refer to; checked before any
        process does work."""
        return {"train": Layout.of(dp=world_size)}

    @classmethod
    def further_writes(cls, config: Any) -> dict[str, tuple[str, ...]]:
        """Columns that methods write with these settings, besides those of their declaration, by the
        method's name."""
        return {}

    def close(self) -> None:
        """Called once when the host goes down in good order."""
