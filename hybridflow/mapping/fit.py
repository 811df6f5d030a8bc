"""fit: constants from measurements, by least squares on relative errors with no constant below 0.

The simulators are linear in what is fitted (seconds per FLOP, per byte, per layer, per micro-batch, per decode step, per running
sequence), so each fit is one small non-negative problem, solved exactly. Pure NumPy: what measures is recipes/calibrate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import median

import numpy as np

from hybridflow.dataflow import CallKind
from hybridflow.mapping.calibration import Calibration
from hybridflow.mapping.cluster import DeviceKind
from hybridflow.mapping.compare import Run
from hybridflow.mapping.compute import layer_flops
from hybridflow.mapping.generation import generation_time
from hybridflow.mapping.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.measurements import CollectiveSample, GenerationSample, Measurements, PassSample, SyncSample
from hybridflow.mapping.passes import Machine, inference_time, training_time
from hybridflow.mapping.schedule import CONTROLLER
from hybridflow.mapping.space import SearchSpace
from hybridflow.mapping.workload import Lengths, Workload

SMALL = 1e-12
EFFICIENCIES = (0.1, 8.0, 45)
"""Fractions of the copying bandwidth at which weights and caches may be read: over 1 where they stay in a processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The device kind and the constants that explain the measurements, and how well they do."""

    kind: DeviceKind
    calibration: Calibration
    errors: dict[str, tuple[float, float]]
    """What was fitted -> (median, largest) relative error of its samples."""


def fit(measurements: Measurements, *, space: SearchSpace, calibration: Calibration | None = None) -> Fit:
    """Constants for planning on machines like the measured one; what was not measured keeps its value from `calibration`."""
    given = calibration or Calibration()
    kind = DeviceKind(
        name=measurements.name,
        memory_bytes=measurements.memory_bytes,
        flops=measurements.matmul_flops,
        memory_bandwidth=measurements.memory_bandwidth,
        intra_bandwidth=1e9,
        inter_bandwidth=1e9,
        host_bandwidth=measurements.memory_bandwidth,
        devices_per_node=measurements.num_processes,
    )
    found = replace(given, name=measurements.name, call_overhead_s=measurements.call_s, intra_latency_s=0.0, link_efficiency=1.0)
    errors: dict[str, tuple[float, float]] = {}
    if measurements.collectives:
        kind, found = fit_links(measurements.collectives, kind, found)
    forward = [sample for sample in measurements.passes if not sample.training]
    training = [sample for sample in measurements.passes if sample.training]
    for _ in range(2):  # each of the two needs a constant of the other: the head's weights are read in both
        found = fit_forward(forward, kind, found, space) if forward else found
        found = fit_decoding(measurements.generations, kind, found, space) if measurements.generations else found
    if forward:
        errors["forward"] = _errors([predicted_pass(sample, kind, found, space) / sample.seconds for sample in forward])
    if training:
        found = fit_backward(training, kind, found, space)
        errors["training"] = _errors([predicted_pass(sample, kind, found, space) / sample.seconds for sample in training])
    if measurements.generations:
        errors["generation"] = _errors(
            [predicted_generation(sample, kind, found, space) / sample.seconds for sample in measurements.generations]
        )
    if measurements.syncs:
        found = fit_syncs(measurements.syncs, kind, found, space)
        errors["sync"] = _errors([predicted_sync(sample, kind, found, space) / sample.seconds for sample in measurements.syncs])
    return Fit(kind=kind, calibration=found, errors=errors)


def refine(calibration: Calibration, runs: Sequence[Run]) -> Calibration:
    """What only real runs show, from runs in one pool that were predicted with `calibration`, as medians and never below 0.

    Forward calls' seconds beyond their prediction are the overhead of every call; generation's beyond that the overhead of a sync between
    ranks (of any sync where the pool has one rank). Functions take what they took. What a step has between its calls goes to its
    controller function; that includes handing over columns, which go through the node's object store whether pools differ or not, so
    that different pools add no overhead of their own.
    """
    beyond: dict[str, list[float]] = {CallKind.inference: [], CallKind.generation: []}
    functions, between = [], []
    for run in runs:
        for call in run.mapping.calls:
            if call.call not in run.measured_s:
                continue
            if call.pool == CONTROLLER:
                functions.append(run.measured_s[call.call])
            elif call.kind in beyond:
                beyond[call.kind].append(run.measured_s[call.call] - call.seconds)
        between.append(run.step_s - sum(run.measured_s.values()))
    every_call = max(median(beyond[CallKind.inference] or [0.0]), -calibration.call_overhead_s)
    name = "sync_ranks_s" if all(run.mapping.num_devices > 1 for run in runs) else "sync_overhead_s"
    before = asdict(calibration)[name]
    entering = max(median(beyond[CallKind.generation] or [0.0]) - every_call, -before)
    return replace(
        calibration,
        call_overhead_s=calibration.call_overhead_s + every_call,
        **{name: before + entering},
        function_s=median(functions) if functions else calibration.function_s,
        controller_s=max(0.0, median(between)) if between else calibration.controller_s,
        transfer_overhead_s=0.0 if between else calibration.transfer_overhead_s,
    )


def fit_links(samples: Sequence[CollectiveSample], kind: DeviceKind, given: Calibration) -> tuple[DeviceKind, Calibration]:
    """seconds = latency log2(ranks) + bytes (ranks - 1)/ranks / bandwidth."""
    features = [(np.log2(sample.ranks), sample.num_bytes * (sample.ranks - 1) / sample.ranks) for sample in samples]
    latency, per_byte = nonnegative_least_squares(np.array(features), np.array([sample.seconds for sample in samples]))
    bandwidth = 1.0 / max(per_byte, SMALL)
    return replace(kind, intra_bandwidth=bandwidth, inter_bandwidth=bandwidth), replace(given, intra_latency_s=latency)


def fit_forward(samples: Sequence[PassSample], kind: DeviceKind, given: Calibration, space: SearchSpace) -> Calibration:
    """Seconds per FLOP, per byte of element-wise traffic, per layer and micro-batch, and per micro-batch."""
    features = np.array([_forward_features(sample, space) for sample in samples])
    reading = kind.memory_bandwidth * given.bandwidth_efficiency
    heads = [sample.micro_batches * space.parameter_bytes * sample.model.head_parameters / reading for sample in samples]
    targets = np.array([sample.seconds - given.call_overhead_s - head for sample, head in zip(samples, heads, strict=True)])
    per_flop, per_byte, per_layer, per_micro_batch = nonnegative_least_squares(
        features, targets, 1.0 / np.array([sample.seconds for sample in samples])
    )
    return replace(
        given,
        matmul_efficiency=1.0 / max(per_flop * kind.flops, SMALL),
        elementwise_efficiency=1.0 / max(per_byte * kind.memory_bandwidth, 1e-3),
        layer_overhead_s=per_layer,
        micro_batch_overhead_s=per_micro_batch,
    )


def _forward_features(sample: PassSample, space: SearchSpace) -> tuple[float, float, float, float]:
    """The same sums that passes.inference_time makes, but for the head's weights (and without weights being the bottleneck)."""
    model = sample.model
    length = sample.prompt + sample.response
    tokens, scored = sample.rows * length, sample.rows * sample.response
    flops = model.num_layers * layer_flops(model, tokens, length / 2) + 2.0 * scored * model.head_parameters
    width = 1 if model.scalar_head else model.vocab_size
    traffic = model.num_layers * 2.0 * space.activation_bytes * model.activation_elements_per_token * tokens
    traffic += 8.0 * scored * width
    return flops, traffic, float(model.num_layers * sample.micro_batches), float(sample.micro_batches)


def fit_backward(samples: Sequence[PassSample], kind: DeviceKind, given: Calibration, space: SearchSpace) -> Calibration:
    """The backward factor with the least relative error: training seconds are linear in it."""
    none = [predicted_pass(sample, kind, replace(given, backward_factor=0.0), space) for sample in samples]
    one = [predicted_pass(sample, kind, replace(given, backward_factor=1.0), space) for sample in samples]
    features = np.array([[high - low] for low, high in zip(none, one, strict=True)])
    targets = np.array([sample.seconds - low for low, sample in zip(none, samples, strict=True)])
    weights = 1.0 / np.array([sample.seconds for sample in samples])
    factor = nonnegative_least_squares(features, targets, weights)[0]
    return replace(given, backward_factor=float(factor))


def fit_decoding(samples: Sequence[GenerationSample], kind: DeviceKind, given: Calibration, space: SearchSpace) -> Calibration:
    """The bandwidth that reading weights and caches reaches (by a coarse and a fine grid, because a step is bound by it or by products),
    and for each the host's seconds per decode step, per layer of a step, and per running sequence of a step."""
    coarse = np.geomspace(*EFFICIENCIES)
    best = min((_decoding(samples, kind, given, space, float(efficiency)) for efficiency in coarse), key=lambda pair: pair[0])
    found, width = best[1].bandwidth_efficiency, coarse[1] / coarse[0]
    fine = np.geomspace(found / width, found * width, len(coarse))
    tried = (_decoding(samples, kind, given, space, float(efficiency)) for efficiency in fine)
    return min((best, *tried), key=lambda pair: pair[0])[1]


def _decoding(
    samples: Sequence[GenerationSample], kind: DeviceKind, given: Calibration, space: SearchSpace, efficiency: float
) -> tuple[float, Calibration]:
    """(sum of squared relative errors, constants) with the overheads that are best for this bandwidth."""
    bare = replace(
        given, bandwidth_efficiency=efficiency, decode_step_overhead_s=0.0, decode_layer_overhead_s=0.0, decode_row_overhead_s=0.0
    )
    features = np.array(
        [(sample.response, sample.response * sample.model.num_layers, sample.response * sample.rows) for sample in samples], dtype=float
    )
    targets = np.array([sample.seconds - predicted_generation(sample, kind, bare, space) for sample in samples])
    weights = 1.0 / np.array([sample.seconds for sample in samples])
    step, layer, row = nonnegative_least_squares(features, targets, weights)
    off = (features @ np.array([step, layer, row]) - targets) * weights
    return float(off @ off), replace(bare, decode_step_overhead_s=step, decode_layer_overhead_s=layer, decode_row_overhead_s=row)


def fit_syncs(samples: Sequence[SyncSample], kind: DeviceKind, given: Calibration, space: SearchSpace) -> Calibration:
    """Fixed seconds of a sync and seconds per parameter, beyond the copy."""
    bare = replace(given, sync_overhead_s=0.0, sync_parameter_s=0.0)
    targets = np.array([sample.seconds - predicted_sync(sample, kind, bare, space) for sample in samples])
    features = np.array([(1.0, sample.model.num_parameters) for sample in samples])
    fixed, per_parameter = nonnegative_least_squares(features, targets, 1.0 / np.array([sample.seconds for sample in samples]))
    return replace(given, sync_overhead_s=fixed, sync_parameter_s=per_parameter)


def predicted_sync(sample: SyncSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace) -> float:
    """What options.entry_seconds says for one device."""
    copied = (
        0.0 if space.shared_generation_weights else 2.0 * space.parameter_bytes / (kind.memory_bandwidth * calibration.bandwidth_efficiency)
    )
    return calibration.sync_overhead_s + (calibration.sync_parameter_s + copied) * sample.model.num_parameters


def predicted_pass(sample: PassSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace) -> float:
    """What the simulators say to a measured pass."""
    length = sample.prompt + sample.response
    workload = Workload(num_prompts=sample.rows, prompt=Lengths.fixed(sample.prompt), response=Lengths.fixed(sample.response))
    layout = ModelLayout(micro_batch_tokens=-(-sample.rows * length // sample.micro_batches))
    machine = Machine(kind, calibration, space, workload)
    if sample.training:
        return training_time(sample.model, layout, machine).total
    return inference_time(sample.model, layout, machine, trained=True).total


def predicted_generation(sample: GenerationSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace) -> float:
    """What the simulator says to a measured generation call."""
    workload = Workload(num_prompts=sample.rows, prompt=Lengths.fixed(sample.prompt), response=Lengths.fixed(sample.response))
    machine = Machine(kind, calibration, space, workload)
    return generation_time(sample.model, GenerationLayout(max_running=sample.rows), machine).total


def nonnegative_least_squares(features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
    """x >= 0 with the least sum of squares of weights * (features x - targets); weights default to 1/targets (relative errors).

    Exact by trying every subset of columns that may be positive (there are at most four): the optimum is the unconstrained solution
    of its own support (Lawson and Hanson 1974, chapter 23).
    """
    scale = weights if weights is not None else 1.0 / np.maximum(np.abs(targets), SMALL)
    scaled, goal = features * scale[:, None], targets * scale
    size = features.shape[1]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    best, solution = float(goal @ goal), np.zeros(size)
    for count in range(1, size + 1):
        for support in combinations(range(size), count):
            columns = list(support)
            part = np.linalg.lstsq(scaled[:, columns] / norms[columns], goal, rcond=None)[0] / norms[columns]
            if (part < 0).any():
                continue
            residual = float(((scaled[:, columns] @ part - goal) ** 2).sum())
            if residual < best * (1 - 1e-9):
                best, solution = residual, np.zeros(size)
                solution[columns] = part
    return [float(value) for value in solution]


def _errors(ratios: Sequence[float]) -> tuple[float, float]:
    """(median, largest) of |ratio - 1|."""
    off = sorted(abs(ratio - 1.0) for ratio in ratios)
    return off[len(off) // 2], off[-1]
