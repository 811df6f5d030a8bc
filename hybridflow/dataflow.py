"""Dataflow: the graph of an algorithm's step, as plain data.

hybridflow/tracing.py makes it from a controller's step. It is checked before anything starts,
drawn, and given to the mapper. It holds names only: no tensors and no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CallKind(StrEnum):
    """The kind of work of a call; the mapper chooses a simulator by it (docs/paper.md section
    4)."""

    generation = "generation"
    inference = "inference"
    training = "training"
    controller = "controller"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the step.

    Call(name="actor.generate_sequences", role="actor", method="generate_sequences", kind=CallKind.generation,
         reads=("prompt_ids",), writes=("response_ids", "rollout_log_probs"), depends_on=())
    """

    name: str
    """Unique in the graph: role.method, with #2, #3, ... from the second call of the same
    method on."""
    role: str
    """The model that runs it; "controller" for plain functions."""
    method: str
    kind: CallKind
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    """Names of the calls that wrote the columns it reads, and of earlier calls whose weights it
    needs."""
    options: tuple[tuple[str, object], ...] = ()
    """Its arguments by keyword that are no batches: (("do_sample", False),)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataflow:
    """The calls of one step in program order."""

    algorithm: str
    calls: tuple[Call, ...]
    inputs: tuple[str, ...] = ()
    """Columns that the prompts bring."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models, in order of first use."""
        roles: dict[str, None] = {}
        for call in self.calls:
            if call.kind is not CallKind.controller:
                roles[call.role] = None
        return tuple(roles)

    @property
    def positions(self) -> dict[str, int]:
        """Name of a call -> its index in `calls`."""
        return {call.name: position for position, call in enumerate(self.calls)}

    def call(self, name: str) -> Call:
        positions = self.positions
        if name not in positions:
            raise ValueError(f"dataflow: no call named {name!r}; known: {', '.join(positions)}")
        return self.calls[positions[name]]
