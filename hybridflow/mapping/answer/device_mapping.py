"""DeviceMapping: the answer as plain data: pools, their roles, every layout, predicted seconds
and bytes per call; JSON in and out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridflow.mapping.question.files import checked, read_json
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Pool(name="actor+critic", group=0, kind="A100-80GB", num_devices=16, roles=("actor",
    "critic"))"""

    name: str
    group: int = 0
    """Index of the cluster's node group."""
    kind: str = ""
    num_devices: int
    roles: tuple[str, ...]

    @property
    def devices(self) -> tuple[int, int]:
        """(node group, number of devices), as the search counts them."""
        return self.group, self.num_devices


@dataclass(frozen=True, kw_only=True, slots=True)
class RolePlan:
    """A role's pool and layouts; a role that only generates has no `layout`.

    RolePlan(role="actor", pool="all", layout=ModelLayout(t=8, d=2),
             generation=GenerationLayout(tg=2, replicas=8))
    """

    role: str
    pool: str
    layout: ModelLayout | None = None
    generation: GenerationLayout | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPlan:
    """A call of the step as predicted."""

    call: str
    role: str
    pool: str
    kind: str
    start_s: float
    end_s: float
    causes_s: dict[str, float]
    """Cause -> seconds; they add up to end_s - start_s."""
    bytes: dict[str, float]
    """Part -> bytes on the fullest device while the call runs: those that all roles of the pool
    keep there, and those that the call needs besides."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMapping:
    """DeviceMapping.load(path); mapping.pool_of("actor"); mapping.save(path)"""

    algorithm: str
    cluster: str
    pools: tuple[Pool, ...]
    roles: tuple[RolePlan, ...]
    calls: tuple[CallPlan, ...] = ()
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    """Prompt and response tokens of a step over its seconds: the paper's throughput."""
    capacity_bytes: dict[str, float]
    """Pool -> bytes of a device that can be planned with."""
    process_bytes: dict[str, float] = field(default_factory=dict)
    """Pool -> the most memory of one of its processes as the system counts it, where that is the
    device's (CPUs): peak_bytes, the process itself, and what its allocator can't give out."""
    sharing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Pool -> its roles whose frozen weights are in memory once."""

    def pool(self, name: str) -> Pool:
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise ValueError(
            f"mapping: no pool named {name!r}; known: {', '.join(pool.name for pool in self.pools)}"
        )

    def role(self, role: str) -> RolePlan:
        for plan in self.roles:
            if plan.role == role:
                return plan
        raise ValueError(
            f"mapping: no role named {role!r}; known: {', '.join(plan.role for plan in self.roles)}"
        )

    def pool_of(self, role: str) -> Pool:
        return self.pool(self.role(role).pool)

    def peak_bytes(self, pool: str) -> float:
        """Most bytes on the fullest device of the pool, over all its calls."""
        return max((call.total_bytes for call in self.calls_in(pool)), default=0.0)

    def calls_in(self, pool: str) -> list[CallPlan]:
        """The calls that run in the pool, in program order."""
        return [call for call in self.calls if call.pool == pool]

    @property
    def fits(self) -> bool:
        """Whether every pool's devices have the memory that its calls need."""
        for pool in self.pools:
            if self.peak_bytes(pool.name) > self.capacity_bytes[pool.name] * (1 + 1e-9):
                return False
        return True

    @property
    def num_devices(self) -> int:
        return sum(pool.num_devices for pool in self.pools)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DeviceMapping:
        """The inverse of to_json; predictions may be missing in a mapping that a user wrote by
        hand."""
        for key in ("pools", "roles"):
            if not isinstance(content.get(key), list):
                raise ValueError(
                    f"mapping: there is no list {key!r}; it needs pools (name, num_devices, "
                    "roles) and roles (role, pool, layout)"
                )
        pools, roles, calls = [], [], []
        for number, pool in enumerate(content["pools"]):
            pools.append(_pool(pool, f"mapping: pools[{number}]"))
        for number, plan in enumerate(content["roles"]):
            roles.append(_role_plan(plan, f"mapping: roles[{number}]"))
        for number, call in enumerate(content.get("calls", ())):
            calls.append(CallPlan(**checked(CallPlan, call, f"mapping: calls[{number}]")))
        return cls(
            algorithm=content.get("algorithm", ""),
            cluster=content.get("cluster", ""),
            pools=tuple(pools),
            roles=tuple(roles),
            calls=tuple(calls),
            step_s=content.get("step_s", 0.0),
            tokens_per_s=content.get("tokens_per_s", 0.0),
            capacity_bytes=content.get("capacity_bytes", {}),
            process_bytes=content.get("process_bytes", {}),
            sharing={pool: tuple(of) for pool, of in content.get("sharing", {}).items()},
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> DeviceMapping:
        return cls.from_json(read_json(path, "mapping"))


def _pool(content: Any, where: str) -> Pool:
    arguments = checked(Pool, content, where)
    if not isinstance(arguments["roles"], (list, tuple)):
        raise ValueError(f"{where}: roles is {arguments['roles']!r}; it must be a list of roles")
    return Pool(**{**arguments, "roles": tuple(arguments["roles"])})


def _role_plan(content: Any, where: str) -> RolePlan:
    arguments = checked(RolePlan, content, where)
    plan = RolePlan(role=arguments["role"], pool=arguments["pool"])
    layout, generation = arguments.get("layout"), arguments.get("generation")
    if layout is not None:
        fields = checked(ModelLayout, layout, f"{where}.layout")
        plan = replace(plan, layout=ModelLayout(**fields))
    if generation is not None:
        fields = checked(GenerationLayout, generation, f"{where}.generation")
        plan = replace(plan, generation=GenerationLayout(**fields))
    return plan
