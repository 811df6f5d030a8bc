"""Setting: everything that a mapping is computed from, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from hybridflow.dataflow import Call, CallKind, Dataflow
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.simulate.passes import Machine
from hybridflow.mapping.simulate.schedule import Schedule
from hybridflow.mapping.simulate.transition import transfer_time

GENERATION = "generation"
"""The role that generates with the actor's weights in another pool, after `split_generation`."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The question as the search reads it.

    Setting(dataflow=ppo, models={"actor": llama, ..., "reward": None},
            cluster=Cluster.parse("2x8xA100-80GB"), workload=workload)

    A role whose model is None is a Python function: it takes part in the timeline and needs no
    devices.
    """

    dataflow: Dataflow
    models: Mapping[str, ModelSpec | None]
    cluster: Cluster
    workload: Workload
    calibration: Calibration = field(default_factory=Calibration)
    space: SearchSpace = field(default_factory=SearchSpace)
    weights_from: Mapping[str, str] = field(default_factory=dict)
    """Role that only generates -> the role that trains its weights in another pool."""

    def __post_init__(self) -> None:
        missing = [role for role in self.dataflow.roles if role not in self.models]
        if missing:
            raise ValueError(
                f"models: no entry for {missing} of algorithm {self.dataflow.algorithm}; give a "
                "ModelSpec, or None for a function"
            )
        for role in self.roles:
            if role in self.weights_from and not self.only_generates(role):
                raise ValueError(
                    f"weights_from: {role} also runs {sorted(self.kinds(role))}; only a role that "
                    "does nothing but generate can borrow weights"
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that need devices, in order of first use."""
        return tuple(role for role in self.dataflow.roles if self.models[role] is not None)

    def model(self, role: str) -> ModelSpec:
        spec = self.models[role]
        assert spec is not None, f"{role} is a function"
        return spec

    def calls(self, role: str) -> tuple[Call, ...]:
        """The role's calls in program order."""
        return self._calls[role]

    def kinds(self, role: str) -> set[CallKind]:
        """The kinds of the role's calls."""
        return self._kinds[role]

    def trained(self, role: str) -> bool:
        return CallKind.training in self._kinds[role]

    def sharing(self, roles: Iterable[str]) -> tuple[str, ...]:
        """The roles of a pool whose frozen weights are the same ones, where a role has an adapter on
        them; that role is first. They are in memory once where layouts are equal."""
        of_base: dict[str, list[str]] = {}
        for role in roles:
            if self.model(role).base and not self.only_generates(role):
                of_base.setdefault(self.model(role).base, []).append(role)
        for members in of_base.values():
            adapted = [role for role in members if self.model(role).adapter is not None]
            policies = [role for role in adapted if not self.model(role).scalar_head]
            if not policies:  # a reference is the policy with its adapter left out
                members = adapted
            if adapted and len(members) > 1:
                lender = (policies or adapted)[0]
                return (lender, *(role for role in members if role != lender))
        return ()

    def generates(self, role: str) -> bool:
        return CallKind.generation in self._kinds[role]

    def only_generates(self, role: str) -> bool:
        return self._kinds[role] == {CallKind.generation}

    @cached_property
    def _calls(self) -> dict[str, tuple[Call, ...]]:
        calls: dict[str, tuple[Call, ...]] = dict.fromkeys(self.dataflow.roles, ())
        for call in self.dataflow.calls:
            if call.kind is not CallKind.controller:
                calls[call.role] += (call,)
        return calls

    @cached_property
    def _kinds(self) -> dict[str, set[CallKind]]:
        kinds: dict[str, set[CallKind]] = {}
        for role, calls in self._calls.items():
            kinds[role] = {call.kind for call in calls}
        return kinds

    def machine(self, group: int) -> Machine:
        """The simulators' view of a pool in the cluster's node group number `group`."""
        return self._machines[group]

    @cached_property
    def _machines(self) -> tuple[Machine, ...]:
        shared = (self.calibration, self.space, self.workload)
        return tuple(Machine(group.kind, *shared) for group in self.cluster.groups)

    def capacity(self, group: int) -> float:
        """Bytes of a device of the node group that can be planned with."""
        memory_bytes = self.cluster.groups[group].kind.memory_bytes
        return memory_bytes * self.calibration.memory_fraction - self.calibration.reserved_bytes

    def schedule(self, pool_of: dict[str, str]) -> Schedule:
        """The step's schedule for a placement (role -> pool), with the transfers between pools.

        Generation overlaps with the rest of a step where responses are drawn ahead in a pool
        without the actor; in the actor's own pool it takes its turn.
        """
        ahead = None
        generation = self._ahead
        if generation is not None and generation.role in self.weights_from:
            trained = pool_of[self.weights_from[generation.role]]
            if pool_of[generation.role] != trained:
                ahead = generation.name
        return Schedule(self.dataflow, pool_of, self._transfers, ahead)

    def is_ahead(self, call: Call) -> bool:
        """Whether the call's responses are drawn ahead of the step: those of the first generation
        call, in an asynchronous run."""
        return call is self._ahead

    @cached_property
    def _ahead(self) -> Call | None:
        if self.workload.asynchrony is None:
            return None
        for call in self.dataflow.calls:
            if call.kind is CallKind.generation:
                return call
        return None

    @cached_property
    def _transfers(self) -> dict[tuple[str, str], float]:
        """(producer, consumer) -> seconds of the data between them if their pools differ."""
        seconds: dict[tuple[str, str], float] = {}
        for call in self.dataflow.calls:
            for name in call.depends_on:
                producer = self.dataflow.call(name)
                seconds[name, call.name] = transfer_time(
                    producer, call, self.cluster, self.machine(0)
                )
        return seconds

    def fixed_seconds(self, call: Call) -> float:
        """Duration of a call that runs on no device of the plan."""
        if call.kind is CallKind.controller:
            return self.calibration.controller_s
        return self.calibration.function_s


def split_generation(dataflow: Dataflow, role: str = "actor") -> Dataflow:
    """The same step with generation as a role of its own (`generation`), which a mapping may
    put into another pool."""
    names: dict[str, str] = {}
    for call in dataflow.calls:
        if call.role == role and call.kind is CallKind.generation:
            names[call.name] = f"{GENERATION}{call.name.removeprefix(role)}"
    calls = []
    for call in dataflow.calls:
        depends_on = tuple(names.get(name, name) for name in call.depends_on)
        moved = replace(call, depends_on=depends_on)
        if call.name in names:
            moved = replace(moved, name=names[call.name], role=GENERATION)
        calls.append(moved)
    return replace(dataflow, calls=tuple(calls))
