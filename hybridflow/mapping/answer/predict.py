"""predict: time and memory of a mapping, whether it fits or not; here simulators and memory
meet a whole plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from hybridflow.dataflow import Call, CallKind
from hybridflow.mapping.answer.device_mapping import CallPlan, DeviceMapping, Pool, RolePlan
from hybridflow.mapping.search.options import call_footprint, entry_seconds, pass_time
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.simulate.footprint import (
    Footprint,
    gathered_between,
    resident_footprint,
    shared_bytes,
)
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.moments import gathering_pass
from hybridflow.mapping.simulate.schedule import CONTROLLER
from hybridflow.mapping.simulate.transition import weight_sync_time


def predict(setting: Setting, pools: Sequence[Pool], roles: Sequence[RolePlan]) -> DeviceMapping:
    """The mapping with its predictions; pools and roles must be complete and consistent, as
    judge.check_pools and judge.check_layout demand."""
    plans: dict[str, RolePlan] = {}
    pool_of: dict[str, str] = {}
    for plan in roles:
        plans[plan.role] = plan
        pool_of[plan.role] = plan.pool
    pool_by_name: dict[str, Pool] = {}
    residents: dict[str, Footprint] = {}
    capacities: dict[str, float] = {}
    sharing: dict[str, tuple[str, ...]] = {}
    for pool in pools:
        if members := _sharing(setting, pool, plans):
            sharing[pool.name] = members
        pool_by_name[pool.name] = pool
        residents[pool.name] = _pool_resident(setting, pool, plans)
        capacities[pool.name] = setting.capacity(pool.group)
    causes, seconds = [], []
    for call in setting.dataflow.calls:
        parts = _causes(setting, call, plans, pool_by_name)
        causes.append(parts)
        seconds.append(sum(parts.values()))
    schedule = setting.schedule(pool_of)
    bars = schedule.bars(seconds)
    calls = []
    for call, bar, parts in zip(setting.dataflow.calls, bars, causes, strict=True):
        num_bytes: dict[str, float] = {}
        if bar.pool != CONTROLLER:
            present = residents[bar.pool] + _reshards(setting, call, pool_by_name[bar.pool], plans)
            num_bytes = _bytes(setting, call, plans[call.role], present)
        calls.append(
            CallPlan(
                call=call.name,
                role=call.role,
                pool=bar.pool,
                kind=call.kind.value,
                start_s=bar.start,
                end_s=bar.end,
                causes_s=parts,
                bytes=num_bytes,
            )
        )
    step_s = schedule.makespan(seconds)
    mapping = DeviceMapping(
        algorithm=setting.dataflow.algorithm,
        cluster=str(setting.cluster),
        pools=tuple(pools),
        roles=tuple(roles),
        calls=tuple(calls),
        step_s=step_s,
        tokens_per_s=setting.workload.num_tokens / step_s,
        capacity_bytes=capacities,
        sharing=sharing,
    )
    return replace(mapping, process_bytes=_process_bytes(setting, mapping))


def _process_bytes(setting: Setting, mapping: DeviceMapping) -> dict[str, float]:
    """DeviceMapping.process_bytes; empty where a process' memory is not the device's."""
    constants = setting.calibration
    if not constants.process_bytes:
        return {}
    overhead = constants.allocator_overhead
    if setting.space.preloaded_allocator:
        overhead = constants.preloaded_overhead
    sizes = {}
    for pool in mapping.pools:
        in_use = (1.0 + overhead) * mapping.peak_bytes(pool.name)
        library = 0.0
        if setting.space.generation_library and any(map(setting.generates, pool.roles)):
            library = constants.library_bytes
        sizes[pool.name] = constants.process_bytes + library + in_use
    return sizes


def _causes(
    setting: Setting, call: Call, plans: dict[str, RolePlan], pools: dict[str, Pool]
) -> dict[str, float]:
    """Seconds of a call by cause; causes of 0 seconds are left out."""
    if call.role not in plans:
        return {"controller": setting.fixed_seconds(call)}
    plan = plans[call.role]
    model, machine = setting.model(call.role), setting.machine(pools[plan.pool].group)
    if call.kind is CallKind.generation:
        assert plan.generation is not None
        parts = {
            **asdict(
                generation_time(model, plan.generation, machine, ahead=setting.is_ahead(call))
            ),
            "transition": _transition(setting, call, plan, pools),
        }
    else:
        assert plan.layout is not None
        parts = asdict(pass_time(setting, call.role, pools[plan.pool].group, call, plan.layout))
    return _positive(parts)


def _positive(parts: dict[str, float]) -> dict[str, float]:
    """The parts without those of 0."""
    return {name: value for name, value in parts.items() if value > 0.0}


def _transition(setting: Setting, call: Call, plan: RolePlan, pools: dict[str, Pool]) -> float:
    """Seconds to enter the generation layout, which the role's first generation call of the
    step takes."""
    assert plan.generation is not None
    first = next(other for other in setting.calls(call.role) if other.kind is CallKind.generation)
    if first.name != call.name:
        return 0.0
    group = pools[plan.pool].group
    if call.role in setting.weights_from:
        return weight_sync_time(setting.model(call.role), plan.generation, setting.machine(group))
    if plan.layout is None:
        return 0.0
    return entry_seconds(setting, call.role, group, plan.layout, plan.generation)


def resident(setting: Setting, plan: RolePlan) -> Footprint:
    """Bytes of a role on each device between calls."""
    if plan.layout is None:
        need = call_footprint(setting, plan.role, CallKind.generation, None, plan.generation)
        return Footprint(generation_weights=need.generation_weights)
    model, trained = setting.model(plan.role), setting.trained(plan.role)
    return resident_footprint(model, plan.layout, setting.space, trained=trained) + _engine(
        setting, plan
    )


def _engine(setting: Setting, plan: RolePlan) -> Footprint:
    """Bytes between calls of a generation engine that is not told to release its memory, beside
    the training shards."""
    if plan.layout is None or plan.generation is None or not plan.generation.kept:
        return Footprint()
    need = call_footprint(setting, plan.role, CallKind.generation, plan.layout, plan.generation)
    kept = Footprint(generation_weights=need.generation_weights)
    return kept if setting.space.cache_of_rows else replace(kept, kv_cache=need.kv_cache)


def _pool_resident(setting: Setting, pool: Pool, plans: dict[str, RolePlan]) -> Footprint:
    """Bytes between calls of all roles of a pool; frozen weights that several have, once."""
    total = Footprint()
    for role in pool.roles:
        total = total + resident(setting, plans[role])
    for role in _sharing(setting, pool, plans)[1:]:
        layout, trained = plans[role].layout, setting.trained(role)
        assert layout is not None
        saved = shared_bytes(setting.model(role), layout, setting.space, trained=trained)
        total = total + Footprint(parameters=-saved)
    return total


def _reshards(setting: Setting, call: Call, pool: Pool, plans: dict[str, RolePlan]) -> Footprint:
    """Minus what is not there of the resident bytes while `call` runs: gathered weights of roles that have
    made no pass of the step yet, or whose update is over."""
    missing = 0.0
    for role in pool.roles:
        layout = plans[role].layout
        if layout is None or _has_gathered(setting, role, call):
            continue
        trained = setting.trained(role)
        missing += gathered_between(setting.model(role), layout, setting.space, trained=trained)
    return Footprint(parameters=-missing)


def _has_gathered(setting: Setting, role: str, call: Call) -> bool:
    """Whether a pass of `role` was made in the step before `call` ends, and its update is not over. A
    generation begins with a pass of the trainer."""
    order = [other.name for other in setting.dataflow.calls]
    now = order.index(call.name)
    begun, over = False, False
    for other in setting.calls(role):
        at = order.index(other.name)
        begun = begun or at <= now
        over = over or (other.kind is CallKind.training and at < now)
    return begun and not over


def _sharing(setting: Setting, pool: Pool, plans: dict[str, RolePlan]) -> tuple[str, ...]:
    """The roles whose frozen weights are in memory once: those in the layout of the first."""
    members = setting.sharing(pool.roles)
    shapes = []
    for role in members:
        layout = plans[role].layout
        shapes.append(None if layout is None else layout.shape)
    alike = [role for role, shape in zip(members, shapes, strict=True) if shape == shapes[0]]
    return tuple(alike) if len(alike) > 1 and shapes[0] is not None else ()


def _bytes(
    setting: Setting, call: Call, plan: RolePlan, pool_resident: Footprint
) -> dict[str, float]:
    """Bytes on each device while a call runs, by part; parts of 0 bytes are left out."""
    extra = call_footprint(setting, call.role, call.kind, plan.layout, plan.generation)
    if call.kind is CallKind.generation:
        extra = _fullest_of_generation(setting, plan, extra)
    parts = asdict(pool_resident + extra)
    if call.kind is CallKind.generation:  # resident weights and cache are not needed a second time
        counted = resident(setting, plan) if plan.layout is None else _engine(setting, plan)
        parts["generation_weights"] -= counted.generation_weights
        parts["kv_cache"] -= counted.kv_cache
    return _positive(parts)


def _fullest_of_generation(setting: Setting, plan: RolePlan, drawing: Footprint) -> Footprint:
    """The bytes while rows are drawn, or in the trainer's pass before a sync, if those are more."""
    if plan.layout is None or not setting.trained(plan.role):
        return drawing
    weights = Footprint(generation_weights=drawing.generation_weights)
    if not setting.space.cache_of_rows:
        weights = replace(weights, kv_cache=drawing.kv_cache)
    model, space = setting.model(plan.role), setting.space
    probe = weights + gathering_pass(model, plan.layout, space, trained=True)
    return max(drawing, probe, key=lambda moment: moment.total)
