"""Simulators of training and inference: a call over all rows of a step, compute-bound
(docs/paper.md section 4).

Pipeline: 1F1B, (m + p - 1) micro-batch slots (Narayanan et al. 2021, section 2.2). Tensor: two
all-reduces of the layer's output per layer in each direction (Shoeybi et al. 2020, section 3), two
more when recomputing. Data: gradients are reduced once per update; ZeRO-1 gathers the new
parameters, ZeRO-3 gathers them again for every pass (Rajbhandari et al. 2020, section 7). Context:
the heads of queries, keys, values and outputs change ranks in every layer and direction (Jacobs et
al. 2023), or keys and values are gathered where the heads do not divide; attention is taken to be
balanced over ranks. Every
micro-batch after the first reads its gradients and the sum and writes the sum. Left out:
interleaved schedules, overlap of tensor collectives with compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from hybridflow.mapping.question.adapter import AdapterSpec
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.simulate.compute import elementwise_s, head_s, products_s, rounds
from hybridflow.mapping.simulate.fabric import Fabric
from hybridflow.mapping.simulate.footprint import (
    fetched_bytes,
    is_one_group,
    stage_parameters,
    trained_parameters,
    update_footprint,
)
from hybridflow.mapping.simulate.moments import kept_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of a call by cause; they add up to `total`."""

    compute: float = 0.0
    bubble: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    context: float = 0.0
    """Exchanges of context parallelism around attention."""
    experts: float = 0.0
    """Exchanges of tokens with the ranks that have their experts."""
    parameters: float = 0.0
    """Gathering the parameters that ZeRO has cut."""
    gradients: float = 0.0
    """Adding gradients up over micro-batches and reducing them over data ranks."""
    optimizer: float = 0.0
    offload: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.compute + self.bubble + self.tensor + self.pipeline + self.context
            + self.experts + self.parameters + self.gradients + self.optimizer + self.offload + self.overhead
        )  # fmt: skip

    def __add__(self, other: PassTime) -> PassTime:
        return PassTime(
            compute=self.compute + other.compute,
            bubble=self.bubble + other.bubble,
            tensor=self.tensor + other.tensor,
            pipeline=self.pipeline + other.pipeline,
            context=self.context + other.context,
            experts=self.experts + other.experts,
            parameters=self.parameters + other.parameters,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
            offload=self.offload + other.offload,
            overhead=self.overhead + other.overhead,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """The device, constants, engines and work that every simulator computes with."""

    kind: DeviceKind
    calibration: Calibration
    space: SearchSpace
    workload: Workload

    @property
    def bandwidth(self) -> float:
        return self.kind.memory_bandwidth * self.calibration.bandwidth_efficiency

    @property
    def update_bandwidth(self) -> float:
        return self.kind.memory_bandwidth * self.calibration.update_efficiency

    def call_s(self, num_devices: int) -> float:
        """Fixed seconds of a call in a pool of so many devices."""
        seconds = self.calibration.call_overhead_s
        if num_devices > 1:
            seconds += self.calibration.call_ranks_s
        return seconds


def micro_batches(layout: ModelLayout, workload: Workload, rows: float) -> tuple[int, float]:
    """(number, tokens of each) of the micro-batches of the fullest data replica, for `rows`
    rows in all."""
    tokens = rounds(rows, layout.d) * workload.tokens_per_row
    number = max(1, ceil(tokens / layout.micro_batch_tokens))
    return number, tokens / number


def inference_time(
    model: ModelSpec, layout: ModelLayout, machine: Machine, *, trained: bool
) -> PassTime:
    """Seconds of a forward pass over the step's rows."""
    number, tokens = micro_batches(layout, machine.workload, machine.workload.num_rows)
    slot = _slot(model, layout, machine, tokens, backward=False)
    fetched = 0.0
    if layout.offload and not trained:
        weights = fetched_bytes(model, layout, machine.space, trained=False)
        fetched = weights / machine.kind.host_bandwidth
    return _pipelined(slot, layout, machine, number, offload=fetched)


def training_time(model: ModelSpec, layout: ModelLayout, machine: Machine) -> PassTime:
    """Seconds of all optimizer updates of a step."""
    workload = machine.workload
    updates = workload.num_mini_batches * workload.num_epochs
    number, tokens = micro_batches(layout, workload, workload.num_rows / workload.num_mini_batches)
    slot = _slot(model, layout, machine, tokens, backward=True)
    update = _pipelined(slot, layout, machine, number, offload=0.0)
    gradients, gathering = _data_parallel(model, layout, machine)
    if machine.space.cut_between_steps and not is_one_group(model, layout, machine.space):
        gradients *= number  # a large model's are reduced in every micro-batch
    states = update_footprint(model, layout, machine.space)
    optimizer = (
        2.0 * (states.parameters + states.gradients + states.optimizer) / machine.update_bandwidth
    )
    adding = (
        3.0
        * machine.space.gradient_bytes
        * trained_parameters(model, layout)
        / machine.update_bandwidth
    )
    moved = fetched_bytes(model, layout, machine.space, trained=True)
    call = machine.call_s(layout.num_devices)
    return PassTime(
        compute=updates * update.compute,
        bubble=updates * update.bubble,
        tensor=updates * update.tensor,
        pipeline=updates * update.pipeline,
        context=updates * update.context,
        experts=updates * update.experts,
        parameters=updates * (update.parameters + gathering),
        gradients=updates * (gradients + (number - 1) * adding),
        optimizer=updates * optimizer,
        offload=2.0 * moved / machine.kind.host_bandwidth + updates * update.offload,
        overhead=updates * (update.overhead - call) + call,
    )


def _slot(
    model: ModelSpec, layout: ModelLayout, machine: Machine, tokens: float, *, backward: bool
) -> PassTime:
    """Seconds of a micro-batch on the slowest stage (the last: it has the head), without
    waiting."""
    kind, calibration, space = machine.kind, machine.calibration, machine.space
    layers = model.longest_stage(layout.p)
    passes, head_passes, directions, gathers, sends = 1.0, 1.0, 1, 1.0, 1
    if backward:
        head_passes = 1.0 + calibration.backward_factor
        whole_again = layout.recompute and not layout.selective
        passes = 1.0 + (calibration.backward_factor + whole_again)
        directions, gathers, sends = 2 + layout.recompute, 2.0, 2
    tokens /= layout.c
    attended = machine.workload.attended_per_token
    layer = products_s(
        model,
        kind,
        calibration,
        space,
        tokens=tokens,
        attended=attended,
        t=layout.t,
        e=layout.e,
    )
    cheap = elementwise_s(model, kind, calibration, space, tokens=tokens, t=layout.t)
    cheap += calibration.layer_overhead_s
    layer += cheap
    scored = tokens * machine.workload.response.mean / machine.workload.tokens_per_row
    head = head_s(model, kind, calibration, space, scored_tokens=scored, t=layout.t)
    saved = 0.0
    if backward and layout.selective:  # what takes no product is computed again
        saved = -layers * cheap
    if model.adapter is not None:
        layer += _adapter_s(model.adapter, machine, tokens, layout.t)
        if backward:
            saved += _unneeded_s(model, machine, tokens, scored, layout)
    fabric = Fabric(kind, calibration, layout.num_devices)
    message = space.activation_bytes * model.hidden_size * tokens
    tensor, pipeline, context, experts, parameters = 0.0, 0.0, 0.0, 0.0, 0.0
    if layout.t > 1:
        tensor = layers * 2 * directions * fabric.all_reduce(message, layout.t, 1)
    if layout.p > 1:
        pipeline = sends * fabric.send(message / layout.t, layout.t)
    if layout.c > 1:
        received = space.activation_bytes * tokens * exchanged_per_token(model, layout)
        context = layers * directions * fabric.exchange(received, layout.c, layout.t)
    if layout.e > 1:
        # There and back: a row for every expert of a token, of which e - 1 of e are elsewhere.
        rows = 2.0 * tokens / layout.t * model.routed_rows * (layout.e - 1) / layout.e
        received = space.activation_bytes * model.hidden_size * rows
        stride = expert_stride(layout, machine)
        experts = layers * directions * fabric.exchange(received, layout.e, stride)
    if layout.zero >= 3:
        parameters = gathers * gathering_s(model, layout, machine)
    return PassTime(
        compute=layers * layer * passes + head * head_passes - saved,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        experts=experts,
        parameters=parameters,
        offload=_activations_s(model, layout, machine, tokens) if backward else 0.0,
        overhead=calibration.micro_batch_overhead_s * head_passes,
    )


def _activations_s(model: ModelSpec, layout: ModelLayout, machine: Machine, tokens: float) -> float:
    """Seconds of moving a micro-batch's activations to host memory and back beyond those in which
    the layers compute, as far as that is known: none where products take longer than copies."""
    if not layout.offload_activations:
        return 0.0
    kind, calibration = machine.kind, machine.calibration
    layers = model.longest_stage(layout.p)
    stored_bytes = layers * kept_per_token(model, layout, machine.space) * tokens / layout.t
    attended = machine.workload.attended_per_token
    forward = layers * products_s(
        model,
        kind,
        calibration,
        machine.space,
        tokens=tokens,
        attended=attended,
        t=layout.t,
        e=layout.e,
    )
    leaving = stored_bytes / kind.host_bandwidth - forward
    returning = stored_bytes / kind.host_bandwidth - calibration.backward_factor * forward
    return max(0.0, leaving) + max(0.0, returning)


def expert_stride(layout: ModelLayout, machine: Machine) -> int:
    """How far apart the ranks of an expert group are: those of a stage's data replica are
    neighbours, those of the next one are p replicas away where they are on the same node."""
    inside = layout.t * layout.c
    if layout.e <= inside:
        return 1
    per_node = min(machine.kind.devices_per_node, layout.num_devices)
    return max(1, min(layout.p, per_node // inside))


def exchanged_per_token(model: ModelSpec, layout: ModelLayout) -> float:
    """Numbers that a rank receives from the others of its context group for every token of its
    part, in one layer and direction."""
    width, kv_width = model.query_dim / layout.t, model.kv_dim / layout.t
    if model.num_heads % (layout.t * layout.c):
        return 2.0 * kv_width * (layout.c - 1)
    copies = max(1.0, layout.c * layout.t / model.num_kv_heads)
    return (2.0 * width + 2.0 * kv_width * copies) * (layout.c - 1) / layout.c


def _adapter_s(adapter: AdapterSpec, machine: Machine, tokens: float, t: int) -> float:
    """Seconds of the products with A and B in a layer's forward pass."""
    flops = 2.0 * tokens * (adapter.whole + adapter.cut) / t
    return flops / (machine.kind.flops * machine.calibration.matmul_efficiency)


def _unneeded_s(
    model: ModelSpec, machine: Machine, tokens: float, scored: float, layout: ModelLayout
) -> float:
    """Seconds of a stage's backward pass that frozen weights do without: their gradients, half of
    its products."""
    kind, calibration, space = machine.kind, machine.calibration, machine.space
    layer = products_s(model, kind, calibration, space, tokens=tokens, attended=0.0, t=layout.t)
    head = 0.0
    if not model.scalar_head:
        flops = 2.0 * scored * model.head_parameters / layout.t
        head = flops / (kind.flops * calibration.matmul_efficiency)
    return calibration.backward_factor / 2 * (model.longest_stage(layout.p) * layer + head)


def _pipelined(
    slot: PassTime, layout: ModelLayout, machine: Machine, number: int, offload: float
) -> PassTime:
    """Seconds of `number` micro-batches through p stages: number + p - 1 slots, of which p - 1
    are the bubble."""
    return PassTime(
        compute=number * slot.compute,
        bubble=(layout.p - 1) * slot.total,
        tensor=number * slot.tensor,
        pipeline=number * slot.pipeline,
        context=number * slot.context,
        experts=number * slot.experts,
        parameters=number * slot.parameters,
        offload=offload + number * slot.offload,
        overhead=number * slot.overhead + machine.call_s(layout.num_devices),
    )


def _data_parallel(model: ModelSpec, layout: ModelLayout, machine: Machine) -> tuple[float, float]:
    """(seconds of reducing the gradients, seconds of gathering the new parameters), once per
    update."""
    if layout.shards == 1:
        return 0.0, 0.0
    visible = 1.0 - machine.calibration.gradient_overlap
    fabric = Fabric(machine.kind, machine.calibration, layout.num_devices)
    gradient_bytes = machine.space.gradient_bytes * trained_parameters(model, layout)
    if layout.zero == 0:
        stride = layout.p * layout.t
        return visible * fabric.all_reduce(gradient_bytes, layout.shards, stride), 0.0
    gathering = 0.0
    if layout.zero < 3:
        gathering = gathering_s(model, layout, machine)
    routed = 0.0
    if model.adapter is None:
        routed = machine.space.gradient_bytes * _routed(model, layout)
    reduced = _over_shards(fabric.reduce_scatter, gradient_bytes, routed, layout, machine)
    if layout.replicas > 1:  # every replica has the sum over its own ranks
        apart = layout.p * layout.t * layout.shards
        reduced += fabric.all_reduce(gradient_bytes / layout.shards, layout.replicas, apart)
    return visible * reduced, gathering


def gathering_s(model: ModelSpec, layout: ModelLayout, machine: Machine) -> float:
    """Seconds until every data rank has all of its stage's parameters; a base that is not cut
    over them is there."""
    fabric = Fabric(machine.kind, machine.calibration, layout.num_devices)
    count, routed = trained_parameters(model, layout), 0.0
    is_cut = machine.space.cut_between_steps or layout.zero >= 3
    if model.adapter is not None and is_cut:
        count += stage_parameters(model, layout)
    if model.adapter is None or is_cut:
        routed = _routed(model, layout)
    num_bytes = machine.space.parameter_bytes
    return _over_shards(fabric.all_gather, num_bytes * count, num_bytes * routed, layout, machine)


def _routed(model: ModelSpec, layout: ModelLayout) -> float:
    """Parameters of a rank that are cut over what the expert group leaves of the stage; 0 without
    expert parallelism."""
    if layout.e == 1:
        return 0.0
    return model.longest_stage(layout.p) * model.routed_parameters / layout.e


def _over_shards(
    collective: Callable[[float, int, int], float],
    num_bytes: float,
    routed_bytes: float,
    layout: ModelLayout,
    machine: Machine,
) -> float:
    """Seconds of a collective of `num_bytes` over the ranks that ZeRO cuts over, of which those of
    experts go over fewer, which are further apart."""
    seconds = collective(num_bytes - routed_bytes, layout.shards, layout.p * layout.t)
    if routed_bytes:
        ranks = layout.t * layout.shards // layout.e
        seconds += collective(routed_bytes, ranks, layout.e * expert_stride(layout, machine))
    return seconds
