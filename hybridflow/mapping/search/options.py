"""Options: every way to run one role on n devices of one kind, with its time per call and its memory
(Algorithm 2's loop).

Algorithm 2 with its gaps closed (docs/paper.md section 4): d is an integer, pools smaller than a node are
allowed, the generation layout is chosen together with the training layout, and nothing is chosen here: which
option wins depends on what else lives in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from hybridflow.dataflow import Call, CallKind
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.simulate.footprint import (
    Footprint,
    generation_footprint,
    held_for_generation,
    pass_footprint,
    resident_footprint,
)
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.passes import (
    PassTime,
    gathering_s,
    inference_time,
    micro_batches,
    training_time,
)
from hybridflow.mapping.simulate.transition import transition_time, weight_sync_time


@dataclass(frozen=True, slots=True)
class RoleOption:
    """One role on one pool. `seconds` are per call of the role, in program order; the bytes are those of the
    fullest device."""

    layout: ModelLayout | None
    generation: GenerationLayout | None
    resident: float
    """Between calls."""
    transient: float
    """On top of everybody's resident bytes, in the role's greediest call."""
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PassOption:
    """The part of a role that trains and runs forward passes; `seconds` holds 0 for generation calls."""

    layout: ModelLayout
    resident: float
    transient: float
    held: float
    """Bytes of parameters that generation can compute on in place."""
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GenerationOption:
    """The part of a role that generates, without the transition."""

    layout: GenerationLayout
    weights: float
    """Bytes of its weights."""
    others: float
    """Bytes of everything else that it needs."""
    seconds: float


def role_options(setting: Setting, role: str, group: int, num_devices: int) -> list[RoleOption]:
    """All of them, unpruned: the search works on fronts of this list, brute force on the list itself."""
    generating = generation_options(setting, role, group, num_devices) if setting.generates(role) else [None]
    if all(call.kind is CallKind.generation for call in setting.calls(role)):
        return [generation_only(setting, role, group, option) for option in generating if option is not None]
    passing = pass_options(setting, role, group, num_devices)
    return [combine(setting, role, group, one, other) for one, other in product(passing, generating)]


def model_layouts(setting: Setting, role: str, group: int, num_devices: int) -> Iterator[ModelLayout]:
    """Every layout of the search space for training and forward passes."""
    space, trained = setting.space, setting.trained(role)
    stages = space.zero_stages if trained else (0, *(stage for stage in space.zero_stages if stage == 3))
    recomputes = space.recompute if trained else (False,)
    longest = setting.workload.longest_row
    for p, t, d in space.model_layouts(setting.model(role), setting.cluster.groups[group], num_devices):
        for zero, recompute, offload in product(stages, recomputes, space.offload):
            if (zero and d == 1 and zero != min(stages)) or (zero >= 3 and (p > 1 or d == 1)):
                continue
            for rows in space.micro_batch_rows:
                yield ModelLayout(
                    p=p,
                    t=t,
                    d=d,
                    zero=zero,
                    recompute=recompute,
                    micro_batch_tokens=rows * longest,
                    offload=offload,
                )


def pass_options(setting: Setting, role: str, group: int, num_devices: int) -> list[PassOption]:
    return [
        pass_option(setting, role, group, layout)
        for layout in model_layouts(setting, role, group, num_devices)
    ]


def pass_option(setting: Setting, role: str, group: int, layout: ModelLayout) -> PassOption:
    """Seconds and bytes of the role's training and forward calls with `layout`."""
    resident = resident_footprint(
        setting.model(role), layout, setting.space, trained=setting.trained(role)
    ).total
    calls = setting.calls(role)
    seconds = tuple(pass_time(setting, role, group, call, layout).total for call in calls)
    kinds = {call.kind for call in calls} - {CallKind.generation}
    transient = max(call_footprint(setting, role, kind, layout, None).total for kind in kinds)
    held = held_for_generation(setting.model(role), layout, setting.space)
    return PassOption(layout, resident, transient, held, seconds)


def pass_time(setting: Setting, role: str, group: int, call: Call, layout: ModelLayout) -> PassTime:
    """Time of a training or forward call; nothing for a generation call."""
    model, machine = setting.model(role), setting.machine(group)
    if call.kind is CallKind.generation:
        return PassTime()
    if call.kind is CallKind.inference:
        forward = inference_time(model, layout, machine, trained=setting.trained(role))
        return (
            forward + PassTime(parameters=gathering_s(model, layout, machine))
            if _gathers(setting, call, layout)
            else forward
        )
    updates = training_time(model, layout, machine)
    if any(_gathers(setting, other, layout) for other in setting.calls(role)):
        updates = replace(updates, parameters=updates.parameters - gathering_s(model, layout, machine))
    policy = setting.generates(role) or role in setting.weights_from.values()
    if setting.space.old_log_prob_pass and policy and setting.workload.updates * setting.workload.epochs > 1:
        return updates + inference_time(model, layout, machine, trained=True)
    return updates


def _gathers(setting: Setting, call: Call, layout: ModelLayout) -> bool:
    """Whether a forward call is the one that gathers what the last update has changed: where parameters lie
    cut between steps, the first pass of the next step does, and the update that follows finds them gathered.
    """
    if not (
        setting.space.cut_between_steps and setting.trained(call.role) and layout.zero < 3 and layout.d > 1
    ):
        return False
    passes = [other for other in setting.calls(call.role) if other.kind is not CallKind.generation]
    return call.kind is CallKind.inference and call.name == passes[0].name


def call_footprint(
    setting: Setting,
    role: str,
    kind: CallKind,
    layout: ModelLayout | None,
    generation: GenerationLayout | None,
) -> Footprint:
    """What a call of `kind` needs on top of the resident bytes."""
    model, workload, space = setting.model(role), setting.workload, setting.space
    if kind is CallKind.generation:
        assert generation is not None
        return generation_footprint(
            model, generation, held_for_generation(model, layout, space), space, workload
        )
    assert layout is not None
    backward = kind is CallKind.training
    rows = workload.num_rows / workload.updates if backward else workload.num_rows
    number, _ = micro_batches(layout, workload, rows)
    return pass_footprint(
        model, layout, space, workload, number, trained=setting.trained(role), backward=backward
    )


def generation_options(setting: Setting, role: str, group: int, num_devices: int) -> list[GenerationOption]:
    """For every (pg, tg): as many sequences at once as the engine allows, and fewer where the KV cache may
    not hold them."""
    space, workload = setting.space, setting.workload
    options = []
    for pg, tg, replicas in space.generation_layouts(
        setting.model(role), setting.cluster.groups[group], num_devices
    ):
        rows = -(-workload.num_rows // replicas)
        counts = {min(space.max_running, -(-rows // waves)) for waves in space.waves}
        for running in sorted(counts, reverse=True):
            layout = GenerationLayout(pg=pg, tg=tg, replicas=replicas, max_running=running)
            need = generation_footprint(setting.model(role), layout, 0.0, space, workload)
            seconds = generation_time(setting.model(role), layout, setting.machine(group)).total
            options.append(
                GenerationOption(
                    layout, need.generation_weights, need.total - need.generation_weights, seconds
                )
            )
    return options


def combine(
    setting: Setting, role: str, group: int, one: PassOption, other: GenerationOption | None
) -> RoleOption:
    """Training and generation of one role on one pool."""
    if other is None:
        return RoleOption(one.layout, None, one.resident, one.transient, one.seconds)
    return paired(setting, role, one, other, entry_seconds(setting, role, group, one.layout, other.layout))


def paired(
    setting: Setting, role: str, one: PassOption, other: GenerationOption, transition: float
) -> RoleOption:
    """The same with the transition already known; it is charged to the first generation call of the step."""
    seconds = list(one.seconds)
    for position, call in enumerate(setting.calls(role)):
        if call.kind is CallKind.generation:
            seconds[position] = other.seconds + transition
            transition = 0.0
    extra = other.others + max(0.0, other.weights - one.held)
    return RoleOption(one.layout, other.layout, one.resident, max(one.transient, extra), tuple(seconds))


def entry_seconds(
    setting: Setting, role: str, group: int, layout: ModelLayout, generation: GenerationLayout
) -> float:
    """What it takes to enter the generation layout with new weights: the transition; a copy where the engine
    keeps its own weights; fixed work."""
    if not setting.trained(role):
        return 0.0
    model, machine, calibration = setting.model(role), setting.machine(group), setting.calibration
    shard = model.num_parameters / (generation.pg * generation.tg)
    fixed = calibration.sync_overhead_s + calibration.sync_parameter_s * shard
    fixed += calibration.sync_ranks_s if generation.num_devices > 1 else 0.0
    if not setting.space.shared_generation_weights:
        fixed += 2.0 * setting.space.parameter_bytes * shard / machine.bandwidth
    return transition_time(model, layout, generation, machine) + fixed


def generation_only(setting: Setting, role: str, group: int, option: GenerationOption) -> RoleOption:
    """A role that does nothing but generate; its weights come from another pool if somebody trains them
    there."""
    model, layout = setting.model(role), option.layout
    sync = weight_sync_time(model, layout, setting.machine(group)) if role in setting.weights_from else 0.0
    seconds = tuple(
        option.seconds + (sync if position == 0 else 0.0) for position in range(len(setting.calls(role)))
    )
    return RoleOption(None, layout, option.weights, option.others, seconds)
