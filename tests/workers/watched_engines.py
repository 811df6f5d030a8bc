"""Engines that write down when they have memory and compute, for tests of who owns it when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workers.engines.base import LossFn, Outputs
from workers.engines.fsdp.engine import FsdpEngine
from workers.generation.base import Generations
from workers.generation.hf import HfEngine
from workers.sequences import Sequences

HERE = f"{__name__}:"
"""Begins the names of the engines here, as settings take them."""


class Event(NamedTuple):
    """One thing that the engine of a role did."""

    role: str
    what: str


EVENTS: list[Event] = []
"""What the engines of this process did, in order."""


class WatchedGeneration(HfEngine):
    """Has memory that sleep frees, as vLLM has."""

    awake = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._saw("generation built")

    def _saw(self, what: str) -> None:
        EVENTS.append(Event("actor", what))

    def sleep(self) -> int:
        self._saw("sleep")
        self.awake = False
        self.weight_version = -1
        return 1

    def wake(self) -> None:
        self._saw("wake")
        self.awake = True

    def generate(self, *arguments: Any) -> Generations:
        assert self.awake
        self._saw("generate")
        return super().generate(*arguments)


class WatchedTraining(FsdpEngine):
    def _saw(self, what: str) -> None:
        EVENTS.append(Event(self.context.role, what))

    def _build(self, *arguments: Any, **settings: Any) -> None:
        self._saw("built")
        super()._build(*arguments, **settings)

    def forward(self, sequences: Sequences, **settings: Any) -> Outputs:
        self._saw("forward")
        return super().forward(sequences, **settings)

    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, **settings: Any
    ) -> dict[str, float]:
        self._saw("step")
        return super().train_step(sequences, loss_fn, **settings)

    def offload(self) -> None:
        self._saw("offload")
        super().offload()

    def onload(self) -> None:
        self._saw("onload")
        super().onload()


@dataclass(frozen=True)
class Held:
    """What is on the device while an engine computes."""

    event: Event
    generation: bool
    """Weights and cache of generation."""
    states: frozenset[str]
    """The roles whose optimizer states are there."""


def holdings(events: Sequence[Event], trained: Sequence[str]) -> list[Held]:
    """What was on the device at each computation; `trained`: roles with optimizer states. The
    probe of a sync, a forward pass of the actor between a wake and a generation, is left out: it
    needs both sides."""
    awake, states, probing = False, set[str](), False
    result: list[Held] = []
    for position, event in enumerate(events):
        if event.what in ("generation built", "wake"):
            awake = probing = True
        elif event.what == "sleep":
            awake = False
        elif event.what in ("built", "onload") and event.role in trained:
            states.add(event.role)
        elif event.what == "offload":
            states.discard(event.role)
        if event.what == "generate" or event.role != "actor":
            probing = False
        computes = event.what in ("generate", "forward", "step")
        is_probe = probing and event.what == "forward" and "generate" in names(events[position:])
        if computes and not is_probe:
            # A step brings back the states that it updates when its gradients are there.
            own = {event.role} if event.what == "step" else set[str]()
            result.append(Held(event, awake, frozenset(states | own)))
    return result


def names(events: Sequence[Event]) -> set[str]:
    return {event.what for event in events}
