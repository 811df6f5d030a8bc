"""judge: time and memory of a mapping that the user wrote, whether it fits, and which changes
would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool, RolePlan
from hybridflow.mapping.answer.predict import predict
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.search.fronts import Fronts
from hybridflow.mapping.search.placements import packs
from hybridflow.mapping.search.search import Search
from hybridflow.mapping.search.setting import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """judge(setting, DeviceMapping.load(path)).report() is what `recipes.plan mapping=FILE`
    prints."""

    mapping: DeviceMapping
    """The user's mapping with predictions."""
    overfull: tuple[tuple[str, str, float], ...]
    """(pool, call, bytes beyond what a device has), the worst call of each pool that does not
    fit."""
    changes: tuple[tuple[str, str], ...]
    """(pool, a single change after which that pool fits)."""

    @property
    def fits(self) -> bool:
        return not self.overfull

    def report(self) -> str:
        if self.fits:
            return "fits"
        lines = []
        for pool, call, excess in self.overfull:
            changes = [f"  {text}" for name, text in self.changes if name == pool]
            verdict = "any one of these would do:" if changes else "no single change makes it fit"
            lines.append(
                f"pool {pool}: {call} needs {excess / 1e9:.1f} GB more than a device has; {verdict}"
            )
            lines += changes
        return "\n".join(lines)


def judge(setting: Setting, mapping: DeviceMapping) -> Judgement:
    """Predictions for `mapping`; where no role has a layout, the best layouts for its pools are
    filled in.

    Raises a ValueError for a mapping that makes no sense (a role without pool, a layout of the
    wrong size), not for one that does not fit.
    """
    pools = tuple(replace(pool, kind=_kind(setting, pool)) for pool in mapping.pools)
    mapping = replace(mapping, pools=pools)
    check_pools(setting, pools, mapping.roles)
    if all(plan.layout is None and plan.generation is None for plan in mapping.roles):
        return Judgement(mapping=complete(setting, pools), overfull=(), changes=())
    plans = tuple(_with_defaults(setting, plan, mapping) for plan in mapping.roles)
    for plan in plans:
        check_layout(setting, plan, mapping.pool(plan.pool))
    predicted = predict(setting, pools, plans)
    overfull = tuple(_overfull(predicted))
    changes: tuple[tuple[str, str], ...] = ()
    if overfull:
        changes = tuple(_changes(setting, predicted))
    return Judgement(mapping=predicted, overfull=overfull, changes=changes)


def complete(setting: Setting, pools: tuple[Pool, ...]) -> DeviceMapping:
    """The best layouts for pools of these sizes; a ValueError if none fit."""
    placement = tuple(_roles_in(setting, pool) for pool in pools)
    solution = Search(setting).best_for(placement, tuple(pool.devices for pool in pools))
    if solution is None:
        fronts = Fronts(setting)
        hints = []
        for pool, roles in zip(pools, placement, strict=True):
            if fronts.cheapest(roles, pool.group, pool.num_devices) is None:
                size = _smallest_size(setting, pool) or _never(roles)
                hints.append(f"pool {pool.name}: {size}")
        raise ValueError(f"no layouts fit: {'; '.join(hints)}")
    owner: dict[str, str] = {}
    for pool in pools:
        owner |= dict.fromkeys(pool.roles, pool.name)
    plans = mapping_of(setting, solution).roles
    return predict(setting, pools, [replace(plan, pool=owner[plan.role]) for plan in plans])


def check_pools(setting: Setting, pools: tuple[Pool, ...], plans: tuple[RolePlan, ...]) -> None:
    """Checks that every role is in exactly one pool, the same in both lists, and that the
    cluster has the pools."""
    owners: dict[str, list[str]] = {role: [] for role in setting.roles}
    for pool in pools:
        for role in pool.roles:
            if role not in owners:
                raise ValueError(
                    f"pool {pool.name}: unknown role {role!r} for {setting.dataflow.algorithm}; "
                    f"it has {', '.join(setting.roles)}"
                )
            owners[role].append(pool.name)
    for role, names in owners.items():
        if len(names) != 1:
            raise ValueError(f"role {role} is in pools {names}; put it into exactly one")
    for plan in plans:
        if plan.role in owners and plan.pool != owners[plan.role][0]:
            raise ValueError(
                f"role {plan.role}: its plan says pool {plan.pool!r}, but it is listed in "
                f"{owners[plan.role][0]!r}"
            )
    missing = sorted(set(owners) - {plan.role for plan in plans})
    if missing and any(plan.layout is not None for plan in plans):
        raise ValueError(f"roles {missing} have no plan; give every role a layout, or none of them")
    if not packs(setting.cluster, [pool.devices for pool in pools]):
        sizes = " + ".join(f"{pool.name}={pool.num_devices}" for pool in pools)
        largest = max(group.num_devices for group in setting.cluster.groups)
        raise ValueError(
            f"pools {sizes} do not fit on {setting.cluster} ({setting.cluster.num_devices} devices): a "
            "pool lies inside one node or takes whole nodes, of one kind, which makes at most "
            f"{largest} devices here; change its num_devices, or let the mapper choose the pools "
            "(placement=auto)"
        )


def check_layout(setting: Setting, plan: RolePlan, pool: Pool) -> None:
    """Checks that sizes multiply to the pool's, that heads and layers divide, and that a role
    that generates has a generation layout."""
    model = setting.model(plan.role)
    per_node = setting.cluster.groups[pool.group].kind.devices_per_node
    if setting.generates(plan.role) and plan.generation is None:
        raise ValueError(f"role {plan.role} generates; give it a generation layout (tg, replicas)")
    sizes: list[tuple[str, int, int, int]] = []
    if plan.layout is not None:
        sizes.append(("layout", plan.layout.p, plan.layout.t, plan.layout.num_devices))
    if plan.generation is not None:
        sizes.append(
            ("generation", plan.generation.pg, plan.generation.tg, plan.generation.num_devices)
        )
    for name, pipeline, tensor, devices in sizes:
        if devices != pool.num_devices:
            raise ValueError(
                f"role {plan.role}: {name} uses {devices} devices, pool {pool.name} has "
                f"{pool.num_devices}; their product must agree"
            )
        if model.num_heads % tensor or model.num_layers < pipeline:
            layouts = setting.space.model_layouts(
                model, setting.cluster.groups[pool.group], pool.num_devices
            )
            allowed = ", ".join(f"{p}-{t}-{d}" for p, t, d in layouts)
            raise ValueError(
                f"role {plan.role}: {name} {pipeline}-{tensor} does not fit {model.num_layers} "
                f"layers and {model.num_heads} heads of {model.name}; allowed p-t-d: {allowed}"
            )
        if tensor > per_node:
            raise ValueError(
                f"role {plan.role}: {name} has tensor size {tensor}, a node has {per_node} "
                "devices; keep it inside a node"
            )


def _with_defaults(setting: Setting, plan: RolePlan, mapping: DeviceMapping) -> RolePlan:
    """Gives a role with forward passes but without layout pure data parallelism; the report
    shows it."""
    if (
        plan.layout is not None
        or setting.calls(plan.role) == ()
        or plan.role in setting.weights_from
    ):
        return plan
    return replace(plan, layout=ModelLayout(d=mapping.pool(plan.pool).num_devices))


def _overfull(mapping: DeviceMapping) -> Iterator[tuple[str, str, float]]:
    for pool in mapping.pools:
        capacity = mapping.capacity_bytes[pool.name]
        calls = mapping.calls_in(pool.name)
        worst = max(calls, key=lambda call: call.total_bytes, default=None)
        if worst is not None and worst.total_bytes > capacity * (1 + 1e-9):
            yield pool.name, worst.call, worst.total_bytes - capacity


def _overfull_pools(mapping: DeviceMapping) -> set[str]:
    return {pool for pool, _, _ in _overfull(mapping)}


def _changes(setting: Setting, mapping: DeviceMapping) -> Iterator[tuple[str, str]]:
    """Single changes after which their pool fits, each with the step time that it leads to;
    then the number of devices that would do with other layouts."""
    full = _overfull_pools(mapping)
    for position, plan in enumerate(mapping.roles):
        if plan.pool not in full:
            continue
        for steps in _variations(setting, plan):
            for text, changed in steps:
                roles = [*mapping.roles[:position], changed, *mapping.roles[position + 1 :]]
                predicted = predict(setting, mapping.pools, roles)
                if plan.pool not in _overfull_pools(predicted):
                    yield plan.pool, f"{plan.role}: {text} (step {predicted.step_s:.1f} s)"
                    break
    for pool in mapping.pools:
        size = _smallest_size(setting, pool) if pool.name in full else ""
        if size:
            yield pool.name, f"with other layouts: {size}"


Variations = list[tuple[str, RolePlan]]
"""(text, changed plan) with the same field changed, a little first, then more."""


def _variations(setting: Setting, plan: RolePlan) -> Iterator[Variations]:
    """The plan with a single field changed towards less memory; the first of each list that fits is
    enough."""
    if plan.layout is not None:
        yield from _layout_variations(setting, plan, plan.layout)
    if plan.generation is not None:
        yield from _generation_variations(plan, plan.generation)


def _layout_variations(
    setting: Setting, plan: RolePlan, layout: ModelLayout
) -> Iterator[Variations]:
    trained, tokens = setting.trained(plan.role), setting.workload.longest_row
    if trained and not layout.recompute:
        yield _with_layouts(plan, {"recompute activations": replace(layout, recompute=True)})
    stages: dict[str, ModelLayout] = {}
    for stage in (1, 2, 3) if trained else (3,):
        if stage > layout.zero and layout.shards > 1 and (stage < 3 or layout.p == 1):
            stages[f"ZeRO stage {stage}"] = replace(layout, zero=stage)
    yield _with_layouts(plan, stages)
    if not layout.offload:
        yield _with_layouts(plan, {"offload between calls": replace(layout, offload=True)})
    if layout.micro_batch_tokens > tokens:
        smaller = replace(layout, micro_batch_tokens=tokens)
        yield _with_layouts(plan, {f"micro-batches of {tokens} tokens": smaller})
    heads, largest = setting.model(plan.role).num_heads, _largest_node(setting)
    wider: dict[str, ModelLayout] = {}
    for factor in (2, 4, 8):
        tensor = layout.t * factor
        if layout.d % (factor * layout.replicas) == 0 and heads % tensor == 0 and tensor <= largest:
            changed = replace(layout, t=tensor, d=layout.d // factor)
            wider[f"layout {changed}"] = changed
    for c in setting.space.contexts(tokens, layout.shards):
        if c > layout.c and layout.d * layout.c // c % layout.replicas == 0:
            changed = replace(layout, c=c, d=layout.d * layout.c // c)
            wider[f"layout {changed}"] = changed
    ranks = layout.t * layout.shards
    for e in setting.space.expert_layouts(setting.model(plan.role), layout.t, ranks):
        if e > layout.e and layout.replicas == 1:
            changed = replace(layout, e=e)
            wider[f"layout {changed}"] = changed
    yield _with_layouts(plan, wider)


def _with_layouts(plan: RolePlan, layouts: dict[str, ModelLayout]) -> Variations:
    return [(text, replace(plan, layout=layout)) for text, layout in layouts.items()]


def _generation_variations(plan: RolePlan, generation: GenerationLayout) -> Iterator[Variations]:
    if generation.kept:
        released = replace(plan, generation=replace(generation, kept=False))
        yield [("release generation's memory during training", released)]
    variations = []
    for shift in range(1, generation.max_running.bit_length()):
        running = generation.max_running >> shift
        fewer = replace(plan, generation=replace(generation, max_running=running))
        variations.append((f"at most {running} sequence{'s' * (running > 1)} at once", fewer))
    yield variations


def _roles_in(setting: Setting, pool: Pool) -> tuple[str, ...]:
    """The pool's roles in the setting's order."""
    return tuple(role for role in setting.roles if role in pool.roles)


def _smallest_size(setting: Setting, pool: Pool) -> str:
    """Says from which number of devices on the pool's roles fit with some layouts; "" where the cluster
    has too few for any."""
    fronts = Fronts(setting)
    roles = _roles_in(setting, pool)
    for size in setting.cluster.groups[pool.group].pool_sizes():
        if fronts.cheapest(roles, pool.group, size) is not None:
            return f"{', '.join(roles)} fit together from {size} devices on"
    return ""


def _never(roles: tuple[str, ...]) -> str:
    """Says that the cluster is too small for the roles of a pool."""
    if len(roles) == 1:
        return f"{roles[0]} does not fit on this cluster even alone; use more devices"
    return (
        f"{', '.join(roles)} do not fit together on this cluster; put some of them into another "
        "pool"
    )


def _largest_node(setting: Setting) -> int:
    return max(group.kind.devices_per_node for group in setting.cluster.groups)


def _kind(setting: Setting, pool: Pool) -> str:
    if not 0 <= pool.group < len(setting.cluster.groups):
        raise ValueError(
            f"pool {pool.name}: group {pool.group} does not exist; the cluster has groups "
            f"0..{len(setting.cluster.groups) - 1}"
        )
    return setting.cluster.groups[pool.group].kind.name
