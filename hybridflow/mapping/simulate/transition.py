"""Simulator of moving weights between layouts, and of moving data between pools.

A rank receives the bytes that it needs and does not hold (docs/paper.md section 3: (tp - tg pg) /
(tg pg tp) M), generalised to layouts of which neither contains the other: a generation shard of
M/(tg pg) overlaps the rank's training shard in M/(max(p, pg) max(t, tg)).
"""

from __future__ import annotations

from hybridflow.dataflow import Call
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.simulate.fabric import Fabric
from hybridflow.mapping.simulate.passes import Machine

COLUMN_BYTES_PER_TOKEN = 8
"""int64 ids; float32 columns need half."""


def received_fraction(
    training: ModelLayout,
    generation: GenerationLayout,
    *,
    cut: bool = False,
    routed: float = 0.0,
) -> float:
    """Bytes that each rank receives, as a fraction of the model's; `cut`: parameters are
    sharded over d x c whatever the ZeRO stage. `routed`: the fraction that is experts; divided ones
    are whole where they are, and cut in generation, so that 1 / tg of what is here is needed."""
    shard = 1.0 / (generation.pg * generation.tg)
    present = 1.0 / (max(training.p, generation.pg) * max(training.t, generation.tg))
    if training.zero >= 3 or cut:
        present /= training.shards
    received = max(0.0, shard - present)
    if training.e == 1:
        return received
    here = 1.0 / (max(training.p, generation.pg) * training.e * generation.tg)
    if training.zero >= 3 or cut:
        here *= training.e / (training.t * training.shards)
    return (1.0 - routed) * received + routed * max(0.0, shard - here)


def transition_time(
    model: ModelSpec, training: ModelLayout, generation: GenerationLayout, machine: Machine
) -> float:
    """Seconds from the training layout to the generation layout in the same pool,
    zero-redundancy grouping: consecutive tensor ranks of a stage and the same tensor ranks of
    neighbouring stages hold the bytes that a rank lacks."""
    cut = machine.space.cut_between_steps
    routed = model.num_layers * model.routed_parameters / model.num_parameters
    fraction = received_fraction(training, generation, cut=cut, routed=routed)
    num_bytes = fraction * machine.space.parameter_bytes * model.sent_parameters
    if num_bytes == 0.0:
        return 0.0
    fabric = Fabric(machine.kind, machine.calibration, training.num_devices)
    inner, outer = max(1, training.t // generation.tg), max(1, training.p // generation.pg)
    if training.zero >= 3 or cut:
        outer *= training.shards
    size = max(2, inner * outer)
    if inner > 1 and outer == 1:
        return fabric.exchange(num_bytes, size, 1)
    per_node = min(machine.kind.devices_per_node, training.num_devices)
    stages_per_node = max(1, min(outer, per_node // training.t))
    local = min(size, inner * stages_per_node)
    return fabric.exchange(num_bytes, size, max(1, per_node // local))


def weight_sync_time(model: ModelSpec, generation: GenerationLayout, machine: Machine) -> float:
    """Seconds to fill a generation pool whose weights are trained in another pool: every rank
    receives its shard from outside."""
    shard = machine.space.parameter_bytes * model.sent_parameters / (generation.pg * generation.tg)
    per_node = min(machine.kind.devices_per_node, generation.num_devices)
    efficiency = machine.calibration.link_efficiency
    moving = per_node * shard / (machine.kind.inter_bandwidth * efficiency)
    calibration = machine.calibration
    attesting = calibration.sync_overhead_s + calibration.sync_ranks_s
    attesting += calibration.sync_parameter_s * shard / machine.space.parameter_bytes
    return moving + machine.calibration.inter_latency_s + attesting


def transfer_time(producer: Call, consumer: Call, cluster: Cluster, machine: Machine) -> float:
    """Seconds to bring the columns that `consumer` reads from `producer`'s pool into another.
    Each reader pulls its rows, so that all columns cross once; the bandwidth is that of a
    single node's link, the least that the consumer can have."""
    shared = set(producer.writes) & set(consumer.reads)
    columns = max(1, len(shared))
    num_bytes = columns * COLUMN_BYTES_PER_TOKEN * machine.workload.num_tokens
    slowest = min(group.kind.inter_bandwidth for group in cluster.groups)
    moving = num_bytes / (slowest * machine.calibration.link_efficiency)
    return moving + machine.calibration.transfer_overhead_s
