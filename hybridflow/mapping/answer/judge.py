"""judge: what a mapping that the user wrote would take, whether it fits, and what would have to change."""

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
    """judge(setting, DeviceMapping.load(path)).report() is what `recipes.plan mapping=FILE` prints."""

    mapping: DeviceMapping
    """The user's mapping with predictions."""
    overfull: tuple[tuple[str, str, float], ...]
    """(pool, call, bytes beyond what a device has), the worst call of each pool that does not fit."""
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
            changes = [text for name, text in self.changes if name == pool]
            verdict = "any one of these would do:" if changes else "no single change makes it fit"
            lines += [
                f"pool {pool}: {call} needs {excess / 1e9:.1f} GB more than a device has; {verdict}",
                *(f"  {text}" for text in changes),
            ]
        return "\n".join(lines)


def judge(setting: Setting, mapping: DeviceMapping) -> Judgement:
    """Predictions for `mapping`; where no role has a layout, the best layouts for the given pools are filled
    in.

    Raises a ValueError for a mapping that makes no sense (a role without pool, a layout of the wrong size),
    not for one that does not fit.
    """
    pools = tuple(replace(pool, kind=_kind(setting, pool)) for pool in mapping.pools)
    check_pools(setting, pools, mapping.roles)
    if all(plan.layout is None and plan.generation is None for plan in mapping.roles):
        return Judgement(mapping=complete(setting, pools), overfull=(), changes=())
    plans = tuple(_with_defaults(setting, plan, mapping) for plan in mapping.roles)
    for plan in plans:
        check_layout(setting, plan, next(pool for pool in pools if pool.name == plan.pool))
    predicted = predict(setting, pools, plans)
    overfull = tuple(_overfull(predicted))
    return Judgement(
        mapping=predicted, overfull=overfull, changes=tuple(_changes(setting, predicted)) if overfull else ()
    )


def complete(setting: Setting, pools: tuple[Pool, ...]) -> DeviceMapping:
    """The best layouts for pools that are given with their sizes; a ValueError if none fit."""
    placement = tuple(tuple(role for role in setting.roles if role in pool.roles) for pool in pools)
    found = Search(setting).best_for(placement, tuple((pool.group, pool.num_devices) for pool in pools))
    if found is None:
        fronts = Fronts(setting)
        too_small = [
            pool
            for pool, roles in zip(pools, placement, strict=True)
            if fronts.cheapest(roles, pool.group, pool.num_devices) is None
        ]
        hints = "; ".join(f"pool {pool.name}: {_room(setting, pool)}" for pool in too_small)
        raise ValueError(f"no layouts fit: {hints}")
    chosen = mapping_of(setting, found)
    return predict(setting, pools, [replace(plan, pool=_owner(pools, plan.role)) for plan in chosen.roles])


def check_pools(setting: Setting, pools: tuple[Pool, ...], plans: tuple[RolePlan, ...]) -> None:
    """Every role in exactly one pool, the same in both lists, and the pools on the cluster."""
    owners: dict[str, list[str]] = {role: [] for role in setting.roles}
    for pool in pools:
        for role in pool.roles:
            if role not in owners:
                raise ValueError(
                    f"pool {pool.name}: unknown role {role!r} for {setting.dataflow.algorithm}; it has "
                    f"{', '.join(setting.roles)}"
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
    if not packs(setting.cluster, [(pool.group, pool.num_devices) for pool in pools]):
        sizes = " + ".join(f"{pool.name}={pool.num_devices}" for pool in pools)
        raise ValueError(
            f"pools {sizes} do not fit on {setting.cluster} ({setting.cluster.num_devices} devices, small "
            "pools inside one node)"
        )


def check_layout(setting: Setting, plan: RolePlan, pool: Pool) -> None:
    """Sizes that multiply to the pool's, heads and layers that divide, a generation layout where it
    generates."""
    model, per_node = setting.model(plan.role), setting.cluster.groups[pool.group].kind.devices_per_node
    if setting.generates(plan.role) and plan.generation is None:
        raise ValueError(f"role {plan.role} generates; give it a generation layout (tg, replicas)")
    sizes: list[tuple[str, int, int, int]] = []
    if plan.layout is not None:
        sizes.append(("layout", plan.layout.p, plan.layout.t, plan.layout.num_devices))
    if plan.generation is not None:
        sizes.append(("generation", plan.generation.pg, plan.generation.tg, plan.generation.num_devices))
    for name, pipeline, tensor, devices in sizes:
        if devices != pool.num_devices:
            raise ValueError(
                f"role {plan.role}: {name} uses {devices} devices, pool {pool.name} has {pool.num_devices}; "
                "their product must agree"
            )
        if model.num_heads % tensor or model.num_layers % pipeline:
            allowed = setting.space.model_layouts(model, setting.cluster.groups[pool.group], pool.num_devices)
            raise ValueError(
                f"role {plan.role}: {name} {pipeline}-{tensor} does not divide {model.num_layers} layers and "
                f"{model.num_heads} heads "
                f"of {model.name}; allowed p-t-d: {', '.join('-'.join(map(str, sizes)) for sizes in allowed)}"
            )
        if tensor > per_node:
            raise ValueError(
                f"role {plan.role}: {name} has tensor size {tensor}, a node has {per_node} devices; keep it "
                "inside a node"
            )


def _with_defaults(setting: Setting, plan: RolePlan, mapping: DeviceMapping) -> RolePlan:
    """A role without layout that has forward passes gets pure data parallelism; said in the report by its
    layout."""
    if plan.layout is not None or setting.calls(plan.role) == () or plan.role in setting.weights_from:
        return plan
    return replace(plan, layout=ModelLayout(d=mapping.pool(plan.pool).num_devices))


def _overfull(mapping: DeviceMapping) -> Iterator[tuple[str, str, float]]:
    for pool in mapping.pools:
        calls = [call for call in mapping.calls if call.pool == pool.name]
        worst = max(calls, key=lambda call: call.total_bytes, default=None)
        if worst is not None and worst.total_bytes > mapping.capacity_bytes[pool.name] * (1 + 1e-9):
            yield pool.name, worst.call, worst.total_bytes - mapping.capacity_bytes[pool.name]


def _changes(setting: Setting, mapping: DeviceMapping) -> Iterator[tuple[str, str]]:
    """Single changes after which their pool fits, each with the step time that it leads to; then what other
    layouts would do."""
    full = {name for name, _, _ in _overfull(mapping)}
    for plan in mapping.roles:
        for steps in _variations(setting, plan) if plan.pool in full else ():
            for text, changed in steps:
                roles = [changed if other.role == plan.role else other for other in mapping.roles]
                predicted = predict(setting, mapping.pools, roles)
                if plan.pool not in {name for name, _, _ in _overfull(predicted)}:
                    yield plan.pool, f"{plan.role}: {text} (step {predicted.step_s:.1f} s)"
                    break
    for pool in mapping.pools:
        if pool.name in full:
            yield pool.name, f"with other layouts: {_room(setting, pool)}"


Variation = tuple[str, RolePlan]


def _variations(setting: Setting, plan: RolePlan) -> Iterator[Iterator[Variation]]:
    """The plan with one setting changed towards less memory, a little or more: the first that fits is
    enough."""
    if plan.layout is not None:
        yield from _layout_variations(setting, plan, plan.layout)
    if plan.generation is not None:
        yield from _generation_variations(plan, plan.generation)


def _layout_variations(
    setting: Setting, plan: RolePlan, layout: ModelLayout
) -> Iterator[Iterator[Variation]]:
    trained, cut = setting.trained(plan.role), layout.d > 1
    stages = [
        stage
        for stage in ((1, 2, 3) if trained else (3,))
        if stage > layout.zero and cut and (stage < 3 or layout.p == 1)
    ]
    if trained and not layout.recompute:
        yield iter([("recompute activations", replace(plan, layout=replace(layout, recompute=True)))])
    yield ((f"ZeRO stage {stage}", replace(plan, layout=replace(layout, zero=stage))) for stage in stages)
    if not layout.offload:
        yield iter([("offload between calls", replace(plan, layout=replace(layout, offload=True)))])
    if layout.micro_batch_tokens > (tokens := setting.workload.longest_row):
        yield iter(
            [
                (
                    f"micro-batches of {tokens} tokens",
                    replace(plan, layout=replace(layout, micro_batch_tokens=tokens)),
                )
            ]
        )
    heads, largest = setting.model(plan.role).num_heads, _largest_node(setting)
    factors = [factor for factor in (2, 4, 8) if layout.d % factor == 0 and heads % (layout.t * factor) == 0]
    wider = [
        replace(layout, t=layout.t * factor, d=layout.d // factor)
        for factor in factors
        if layout.t * factor <= largest
    ]
    yield ((f"layout {changed}", replace(plan, layout=changed)) for changed in wider)


def _generation_variations(plan: RolePlan, generation: GenerationLayout) -> Iterator[Iterator[Variation]]:
    if generation.kept:
        yield iter(
            [
                (
                    "release generation's memory during training",
                    replace(plan, generation=replace(generation, kept=False)),
                )
            ]
        )
    halves = [generation.max_running >> shift for shift in range(1, generation.max_running.bit_length())]
    yield (
        (
            f"at most {running} sequence{'s' * (running > 1)} at once",
            replace(plan, generation=replace(generation, max_running=running)),
        )
        for running in halves
    )


def _room(setting: Setting, pool: Pool) -> str:
    """From which number of devices on the pool's roles fit with some layouts."""
    fronts = Fronts(setting)
    roles = tuple(role for role in setting.roles if role in pool.roles)
    for size in setting.cluster.groups[pool.group].pool_sizes():
        if fronts.cheapest(roles, pool.group, size) is not None:
            return f"{', '.join(roles)} fit together from {size} devices on"
    return f"{', '.join(roles)} do not fit together on this cluster; put some of them into another pool"


def _largest_node(setting: Setting) -> int:
    return max(group.kind.devices_per_node for group in setting.cluster.groups)


def _kind(setting: Setting, pool: Pool) -> str:
    if not 0 <= pool.group < len(setting.cluster.groups):
        raise ValueError(
            f"pool {pool.name}: group {pool.group} does not exist; the cluster has groups "
            f"0..{len(setting.cluster.groups) - 1}"
        )
    return setting.cluster.groups[pool.group].kind.name


def _owner(pools: tuple[Pool, ...], role: str) -> str:
    return next(pool.name for pool in pools if role in pool.roles)
