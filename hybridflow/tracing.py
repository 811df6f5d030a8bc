"""Tracing: an algorithm's step, run on abstract batches, gives the dataflow graph.

The same step code runs; only the roles are stand-ins that record. A column that no call writes, one
that is written twice and a reader before its writer are reported here, before any process starts.
Control flow that depends on data cannot be traced: a step that looks at numbers to decide what to
call next puts that decision into a function marked @on_controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, get_type_hints

from hybridflow.batch import Batch
from hybridflow.columns import declared
from hybridflow.dataflow import Call, CallKind, Dataflow
from hybridflow.protocols import Arguments
from hybridflow.results import Metrics
from hybridflow.store import Abstract
from hybridflow.worker import Remote, Worker, remote_methods

P = ParamSpec("P")

NUM_ROWS = 4
"""Rows of an abstract batch; any number would do."""


@dataclass(slots=True)
class Recorder:
    """The calls seen so far."""

    calls: list[Call] = field(default_factory=list)
    last_training: dict[str, str] = field(default_factory=dict)
    """Role -> its last call that changed weights: later calls of the role depend on it."""

    def record(
        self,
        role: str,
        method: str,
        kind: CallKind,
        reads: Sequence[str],
        writes: Sequence[str],
        batches: Sequence[Batch],
        options: Sequence[tuple[str, object]] = (),
    ) -> str:
        seen = sum(call.role == role and call.method == method for call in self.calls)
        name = f"{role}.{method}" + (f"#{seen + 1}" if seen else "")
        writers: dict[str, None] = {}
        for batch in batches:
            writers |= dict.fromkeys(_writers(batch, reads))
        if role in self.last_training:
            writers[self.last_training[role]] = None
        self.calls.append(
            Call(
                name=name,
                role=role,
                method=method,
                kind=kind,
                reads=tuple(reads),
                writes=tuple(writes),
                depends_on=tuple(writers),
                options=tuple(options),
            )
        )
        if kind is CallKind.training:
            self.last_training[role] = name
        return name


_RECORDER: ContextVar[Recorder | None] = ContextVar("hybridflow_recorder", default=None)


class Traced:
    """A role's stand-in: its declared methods record themselves and return abstract results."""

    def __init__(self, role: str, worker_class: type[Worker], recorder: Recorder) -> None:
        self._role = role
        self._worker_class = worker_class
        self._methods = remote_methods(worker_class)
        self._recorder = recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._methods:
            raise AttributeError(
                f"{self._role}: no remote method {name!r}; it has "
                f"{', '.join(sorted(self._methods))}"
            )
        declaration = self._methods[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            options = [pair for pair in kwargs.items() if not isinstance(pair[1], Batch)]
            return self._record(name, declaration, Arguments(args, kwargs).batches(), options)

        return call

    def _record(
        self,
        name: str,
        declaration: Remote,
        batches: Sequence[Batch],
        options: Sequence[tuple[str, object]],
    ) -> Any:
        _check_reads(f"{self._role}.{name}", declaration.reads, batches)
        present = _present(declaration.optional, batches)
        reads = (*declaration.reads, *present)
        call = self._recorder.record(
            self._role, name, declaration.kind, reads, declaration.writes, batches, options
        )
        if declaration.writes:
            return abstract_batch(declaration.writes, call)
        returns_metrics = get_type_hints(getattr(self._worker_class, name)).get("return") is Metrics
        return Metrics() if returns_metrics else []


def on_controller(
    *,
    reads: Sequence[str] = (),
    optional: Sequence[str] = (),
    writes: Sequence[str] = (),
    chooses_rows: bool = False,
) -> Callable[[Callable[P, Batch]], Callable[P, Batch]]:
    """Marks a function of the controller that reads columns and returns a Batch of new ones
    (numbers only, no model).

    @on_controller(reads=("rewards",), writes=("advantages",))
    def compute_advantages(batch: Batch, config: PPOConfig) -> Batch: ...

    chooses_rows: the function returns rows of its first batch with all their columns, and those
    that it writes. How many rows there are may depend on numbers; tracing goes on with as many as
    there were.

    @on_controller(reads=("uid", "rewards"), chooses_rows=True)
    def best_of_each_prompt(batch: Batch) -> Batch: ...
    """
    for name in (*reads, *optional, *writes):
        declared(name)

    def mark(function: Callable[P, Batch]) -> Callable[P, Batch]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Batch:
            recorder = _RECORDER.get()
            batches = Arguments(args, kwargs).batches()
            _check_reads(function.__name__, reads, batches)
            if recorder is None:
                return function(*args, **kwargs)
            present = _present(optional, batches)
            name = recorder.record(
                "controller",
                function.__name__,
                CallKind.controller,
                [*reads, *present],
                writes,
                batches,
            )
            written = abstract_batch(writes, name)
            return batches[0] | written if chooses_rows else written

        return call

    return mark


def trace(
    algorithm: str, step: Callable[[Batch], object], inputs: Sequence[str], recorder: Recorder
) -> Dataflow:
    """Runs `step` (of an algorithm built on Traced roles with the same recorder) on an abstract
    batch of `inputs`."""
    token = _RECORDER.set(recorder)
    try:
        step(abstract_batch(inputs, "prompts"))
    finally:
        _RECORDER.reset(token)
    return Dataflow(algorithm=algorithm, calls=tuple(recorder.calls), inputs=tuple(inputs))


def traced_roles(roles: Mapping[str, type[Worker]]) -> tuple[dict[str, Any], Recorder]:
    """Stand-ins for all roles, and the recorder that they share."""
    recorder = Recorder()
    return {
        role: Traced(role, worker_class, recorder) for role, worker_class in roles.items()
    }, recorder


def abstract_batch(names: Sequence[str], writer: str) -> Batch:
    """A batch of columns that have a writer and no data."""
    return Batch.of_refs({name: Abstract(writer) for name in names}, NUM_ROWS)


def _writers(batch: Batch, names: Sequence[str]) -> list[str]:
    """The calls that wrote these columns, in the order of the columns."""
    writers: dict[str, None] = {}
    for name in names:
        pieces = batch._entries[name].pieces if name in batch else ()
        for piece in pieces:
            if isinstance(piece.ref, Abstract) and piece.ref.writer != "prompts":
                writers[piece.ref.writer] = None
    return list(writers)


def _present(names: Sequence[str], batches: Sequence[Batch]) -> list[str]:
    """The columns that some batch has."""
    columns = set[str]().union(*batches)
    return [name for name in names if name in columns]


def _check_reads(reader: str, reads: Sequence[str], batches: Sequence[Batch]) -> None:
    for batch in batches:
        missing = batch.missing(reads)
        if missing:
            has = ", ".join(batch.columns) or "none"
            raise ValueError(
                f"{reader} reads {', '.join(missing)}, which no earlier call wrote; the batch has "
                f"{has}. Call the writer first, or join its result with `batch |= ...`"
            )


def to_mermaid(dataflow: Dataflow) -> str:
    """The graph as Mermaid text (GitHub and most editors draw it)."""
    shapes = {
        CallKind.generation: '(["{}"])',
        CallKind.training: '[["{}"]]',
        CallKind.inference: '["{}"]',
        CallKind.controller: '{{{{"{}"}}}}',
    }
    ids = {call.name: f"n{index}" for index, call in enumerate(dataflow.calls)}
    lines = ["flowchart LR", f'  prompts[/"prompts: {", ".join(dataflow.inputs)}"/]']
    for call in dataflow.calls:
        lines.append(f"  {ids[call.name]}{shapes[call.kind].format(call.name)}")
        for source in call.depends_on:
            columns = [column for column in dataflow.call(source).writes if column in call.reads]
            label = f"|{', '.join(columns)}|" if columns else "|weights|"
            lines.append(f"  {ids[source]} -->{label} {ids[call.name]}")
        from_prompts = [column for column in call.reads if column in dataflow.inputs]
        if from_prompts and not call.depends_on:
            lines.append(f"  prompts -->|{', '.join(from_prompts)}| {ids[call.name]}")
    return "\n".join(lines)
