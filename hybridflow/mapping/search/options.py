"""Options: every way to run a role on n devices of a kind, with its time per call and its memory
(Algorithm 2's loop).

Algorithm 2 with its gaps closed (docs/paper.md section 4): d is an integer, pools smaller than a
node are allowed, the generation layout is chosen together with the training layout, and nothing is
chosen here: which option wins depends on the other roles of the pool.
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
    merged_bytes,
    resident_footprint,
)
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.moments import gathering_pass, pass_footprint
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
    """A role on a pool. `seconds` are per call of the role, in program order; the bytes are
    those of the fullest device."""

    layout: ModelLayout | None
    generation: GenerationLayout | None
    resident: float
    """Bytes between calls."""
    transient: float
    """Bytes on top of the resident ones of all roles, in the role's greediest call."""
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PassOption:
    """The part of a role that trains and runs forward passes; `seconds` holds 0 for generation
    calls."""

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
    """Bytes of the weights."""
    cache: float
    """Bytes of a cache that is there before rows are drawn."""
    others: float
    """Bytes of everything else that generation needs, the cache among them."""
    seconds: float
    """The step waits for the responses of the call."""
    ahead_seconds: float
    """The responses of the call are drawn ahead; the same where none are."""

    def call_seconds(self, *, ahead: bool) -> float:
        if ahead:
            return self.ahead_seconds
        return self.seconds


def role_options(setting: Setting, role: str, group: int, num_devices: int) -> list[RoleOption]:
    """All options, unpruned: the search works on fronts of this list, brute force on the list
    itself."""
    generating = []
    if setting.generates(role):
        generating = generation_options(setting, role, group, num_devices)
    if setting.only_generates(role):
        return [generation_only(setting, role, group, option) for option in generating]
    result = []
    for option in pass_options(setting, role, group, num_devices):
        if not setting.generates(role):
            result.append(
                RoleOption(option.layout, None, option.resident, option.transient, option.seconds)
            )
        for other in generating:
            transition = entry_seconds(setting, role, group, option.layout, other.layout)
            result.append(paired(setting, role, option, other, transition))
    return result


def model_layouts(
    setting: Setting, role: str, group: int, num_devices: int
) -> Iterator[ModelLayout]:
    """Every layout of the search space for training and forward passes."""
    space, trained = setting.space, setting.trained(role)
    stages, recomputes = space.zero_stages, space.recompute
    if not trained:
        stages, recomputes = ((0, 3) if 3 in space.zero_stages else (0,)), (False,)
    longest = setting.workload.longest_row
    for p, t, shards in space.model_layouts(
        setting.model(role), setting.cluster.groups[group], num_devices
    ):
        if space.compiled and t > 1:  # no engine takes it
            continue
        contexts = space.contexts(longest, shards)
        experts = space.expert_layouts(setting.model(role), t, t * shards)
        choices = product(stages, recomputes, space.offload, contexts, experts)
        if shards % space.replicas or (space.replicas > 1 and shards == space.replicas):
            continue
        for zero, recompute, offload, c, e in choices:
            if shards // c % space.replicas or (space.replicas > 1 and e > 1):
                continue
            alone = shards == 1
            if (zero and alone and zero != min(stages)) or (zero >= 3 and (p > 1 or alone)):
                continue
            for rows in space.micro_batch_rows:
                yield ModelLayout(
                    p=p,
                    t=t,
                    d=shards // c,
                    c=c,
                    e=e,
                    zero=zero,
                    replicas=space.replicas,
                    recompute=recompute,
                    selective=recompute and space.selective,
                    offload_activations=trained and space.offload_activations,
                    compiled=space.compiled,
                    micro_batch_tokens=rows * longest,
                    offload=offload,
                )


def pass_options(setting: Setting, role: str, group: int, num_devices: int) -> list[PassOption]:
    """A pass option for every layout of the search space."""
    layouts = model_layouts(setting, role, group, num_devices)
    return [pass_option(setting, role, group, layout) for layout in layouts]


def pass_option(setting: Setting, role: str, group: int, layout: ModelLayout) -> PassOption:
    """Seconds and bytes of the role's training and forward calls with `layout`."""
    model, calls = setting.model(role), setting.calls(role)
    resident = resident_footprint(model, layout, setting.space, trained=setting.trained(role)).total
    seconds = tuple(pass_time(setting, role, group, call, layout).total for call in calls)
    kinds = setting.kinds(role) - {CallKind.generation}
    transient = max(call_footprint(setting, role, kind, layout, None).total for kind in kinds)
    held = held_for_generation(model, layout, setting.space)
    return PassOption(layout, resident, transient, held, seconds)


def pass_time(setting: Setting, role: str, group: int, call: Call, layout: ModelLayout) -> PassTime:
    """Seconds of a training or forward call; 0 for a generation call."""
    model, machine = setting.model(role), setting.machine(group)
    if call.kind is CallKind.generation:
        return PassTime()
    if call.kind is CallKind.inference:
        forward = inference_time(model, layout, machine, trained=setting.trained(role))
        if _gathers(setting, call, layout):
            return forward + PassTime(parameters=gathering_s(model, layout, machine))
        return forward
    updates = training_time(model, layout, machine)
    if any(_gathers(setting, other, layout) for other in setting.calls(role)):
        updates = replace(
            updates, parameters=updates.parameters - gathering_s(model, layout, machine)
        )
    policy = setting.generates(role) or role in setting.weights_from.values()
    num_updates = setting.workload.num_mini_batches * setting.workload.num_epochs
    if setting.space.old_log_prob_pass and policy and num_updates > 1:
        return updates + inference_time(model, layout, machine, trained=True)
    return updates


def _gathers(setting: Setting, call: Call, layout: ModelLayout) -> bool:
    """Whether a forward call gathers the parameters that the last update has changed: where
    they are sharded between steps, the first pass of the next step does, and the update that
    follows has them gathered."""
    sharded = setting.space.cut_between_steps and layout.zero < 3 and layout.shards > 1
    if not sharded or not setting.trained(call.role):
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
    """The bytes that a call of `kind` needs on top of the resident ones."""
    model, workload, space = setting.model(role), setting.workload, setting.space
    if kind is CallKind.generation:
        assert generation is not None
        held = held_for_generation(model, layout, space)
        merged = merged_bytes(model, layout, space)
        return generation_footprint(model, generation, held, space, workload, merged)
    assert layout is not None
    backward, trained = kind is CallKind.training, setting.trained(role)
    rows: float = workload.num_rows
    if backward:
        rows = rows / workload.num_mini_batches
    number, _ = micro_batches(layout, workload, rows)
    return pass_footprint(
        model, layout, space, workload, number, trained=trained, backward=backward
    )


def generation_options(
    setting: Setting, role: str, group: int, num_devices: int
) -> list[GenerationOption]:
    """For every (pg, tg): as many sequences at once as the engine allows, and fewer where the
    KV cache may not hold them."""
    model, space, workload = setting.model(role), setting.space, setting.workload
    options = []
    for pg, tg, replicas in space.generation_layouts(
        model, setting.cluster.groups[group], num_devices
    ):
        rows = -(-workload.rows_in_flight // replicas)
        counts = {min(space.max_num_seqs, -(-rows // waves)) for waves in space.waves}
        for running in sorted(counts, reverse=True):
            layout = GenerationLayout(pg=pg, tg=tg, replicas=replicas, max_running=running)
            need = generation_footprint(model, layout, 0.0, space, workload)
            weights = need.generation_weights
            machine = setting.machine(group)
            seconds = ahead_seconds = generation_time(model, layout, machine).total
            if workload.asynchrony is not None:
                ahead_seconds = generation_time(model, layout, machine, ahead=True).total
            cache = 0.0 if space.cache_of_rows else need.kv_cache
            others = need.total - weights
            options.append(GenerationOption(layout, weights, cache, others, seconds, ahead_seconds))
    return options


def paired(
    setting: Setting,
    role: str,
    passing: PassOption,
    generating: GenerationOption,
    transition: float,
) -> RoleOption:
    """A role that trains and generates; the first generation call of the step takes
    `transition` seconds more."""
    seconds = list(passing.seconds)
    for position, call in enumerate(setting.calls(role)):
        if call.kind is CallKind.generation:
            drawing = generating.call_seconds(ahead=setting.is_ahead(call))
            seconds[position] = drawing + transition
            transition = 0.0
    weights = max(0.0, generating.weights - passing.held)
    sync = 0.0
    if setting.trained(role):
        gathering = gathering_pass(setting.model(role), passing.layout, setting.space, trained=True)
        sync = weights + generating.cache + gathering.total
    merged = merged_bytes(setting.model(role), passing.layout, setting.space)
    transient = max(passing.transient, generating.others + weights + merged, sync)
    return RoleOption(
        passing.layout, generating.layout, passing.resident, transient, tuple(seconds)
    )


def entry_seconds(
    setting: Setting, role: str, group: int, layout: ModelLayout, generation: GenerationLayout
) -> float:
    """Seconds to enter the generation layout with new weights: the transition; a copy where the
    engine holds weights of its own; fixed work."""
    if not setting.trained(role):
        return 0.0
    model, machine, calibration = setting.model(role), setting.machine(group), setting.calibration
    shard = model.sent_parameters / (generation.pg * generation.tg)
    fixed = calibration.sync_overhead_s + calibration.sync_parameter_s * shard
    if generation.num_devices > 1:
        fixed += calibration.sync_ranks_s
    if not setting.space.shared_generation_weights:
        fixed += 2.0 * setting.space.parameter_bytes * shard / machine.bandwidth
    return transition_time(model, layout, generation, machine) + fixed


def generation_only(
    setting: Setting, role: str, group: int, option: GenerationOption
) -> RoleOption:
    """A role that does nothing but generate; the first call of the step waits for weights that
    are trained in another pool."""
    seconds = []
    for call in setting.calls(role):
        seconds.append(option.call_seconds(ahead=setting.is_ahead(call)))
    if role in setting.weights_from:
        seconds[0] += weight_sync_time(setting.model(role), option.layout, setting.machine(group))
    return RoleOption(None, option.layout, option.weights, option.others, tuple(seconds))
