"""fit: constants from measurements, by least squares on relative errors with no constant below 0.

The simulators are linear in what is fitted (seconds per FLOP, per byte, per layer, per micro-batch, per
decode step, per running sequence), so each fit is one small non-negative problem, solved exactly. Pure NumPy:
what measures is recipes/calibrate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from statistics import median

import numpy as np

from hybridflow.dataflow import CallKind
from hybridflow.mapping.calibrate.compare import Run
from hybridflow.mapping.calibrate.measurements import (
    CollectiveSample,
    GenerationSample,
    Measurements,
    PassSample,
    SyncSample,
)
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.simulate.compute import layer_flops
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.passes import Machine, inference_time, training_time
from hybridflow.mapping.simulate.schedule import CONTROLLER

SMALL = 1e-12
EFFICIENCIES = (0.1, 8.0, 45)
"""Fractions of the copying bandwidth at which weights and caches may be read: over 1 where they stay in a
processor's cache."""
DECODE_PRODUCTS = (0.1, 1.0, 12)
"""Fractions of matmul_efficiency that products with few rows may reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The device kind and the constants that explain the measurements, and how well they do."""

    kind: DeviceKind
    calibration: Calibration
    errors: dict[str, tuple[float, float]]
    """What was fitted -> (median, largest) relative error of its samples."""


def fit(measurements: Measurements, *, space: SearchSpace, calibration: Calibration | None = None) -> Fit:
    """Constants for planning on machines like the measured one; what was not measured keeps its value from
    `calibration`."""
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
    found = replace(
        given,
        name=measurements.name,
        call_overhead_s=measurements.call_s,
        intra_latency_s=0.0,
        link_efficiency=1.0,
    )
    errors: dict[str, tuple[float, float]] = {}
    if measurements.collectives:
        kind, found = fit_links(measurements.collectives, kind, found)
    alone = [sample for sample in measurements.passes if sample.ranks == 1]
    shared = [sample for sample in measurements.passes if sample.ranks > 1]
    forward = [sample for sample in alone if not sample.training]
    training = [sample for sample in alone if sample.training]
    for _ in range(2):  # each of the two needs a constant of the other: the head's weights are read in both
        found = fit_forward(forward, kind, found, space) if forward else found
        found = (
            fit_decoding(measurements.generations, kind, found, space) if measurements.generations else found
        )
    if forward:
        errors["forward"] = _errors(
            [predicted_pass(sample, kind, found, space) / sample.seconds for sample in forward]
        )
    if training:
        found = fit_training(training, kind, found, space)
        errors["training"] = _errors(
            [predicted_pass(sample, kind, found, space) / sample.seconds for sample in training]
        )
    if shared:
        found = fit_shared(shared, kind, found, space)
        errors["training on several ranks"] = _errors(
            [predicted_pass(sample, kind, found, space) / sample.seconds for sample in shared]
        )
    if measurements.generations:
        errors["generation"] = _errors(
            [
                predicted_generation(sample, kind, found, space) / sample.seconds
                for sample in measurements.generations
            ]
        )
    if measurements.syncs:
        found = fit_syncs(measurements.syncs, kind, found, space)
        errors["sync"] = _errors(
            [predicted_sync(sample, kind, found, space) / sample.seconds for sample in measurements.syncs]
        )
    return Fit(kind=kind, calibration=found, errors=errors)


def refine(calibration: Calibration, runs: Sequence[Run]) -> Calibration:
    """What only real runs show, from runs in one pool that were predicted with `calibration`, as medians and
    never below 0.

    Forward calls' seconds beyond their prediction are the overhead of every call, generation's beyond that
    the overhead of a sync; from pools of one rank. From pools of several they are what the ranks cost each
    other, so that runs on one rank come first. Functions take what they took. What a step has between its
    calls goes to its controller function; that includes handing over columns, which go through the node's
    object store whether pools differ or not, so that different pools add no overhead of their own.
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
    several = {run.mapping.num_devices > 1 for run in runs}
    if len(several) != 1:
        raise ValueError(
            "runs: some in pools of one rank, some in pools of several; refine with those of one rank first, "
            "then the others"
        )
    every, entry = (
        ("call_ranks_s", "sync_ranks_s") if several.pop() else ("call_overhead_s", "sync_overhead_s")
    )
    before = asdict(calibration)
    every_call = max(median(beyond[CallKind.inference] or [0.0]), -before[every])
    entering = max(median(beyond[CallKind.generation] or [0.0]) - every_call, -before[entry])
    return replace(
        calibration,
        **{every: before[every] + every_call, entry: before[entry] + entering},
        function_s=median(functions) if functions else calibration.function_s,
        controller_s=max(0.0, median(between)) if between else calibration.controller_s,
        transfer_overhead_s=0.0 if between else calibration.transfer_overhead_s,
    )


def fit_links(
    samples: Sequence[CollectiveSample], kind: DeviceKind, given: Calibration
) -> tuple[DeviceKind, Calibration]:
    """seconds = latency log2(ranks) + bytes (ranks - 1)/ranks / bandwidth; a reduce-scatter takes
    `reduce_factor` times as long."""

    def features(sample: CollectiveSample) -> tuple[float, float]:
        return float(np.log2(sample.ranks)), sample.num_bytes * (sample.ranks - 1) / sample.ranks

    gathers = [sample for sample in samples if not sample.reduces]
    latency, per_byte = nonnegative_least_squares(
        np.array([features(sample) for sample in gathers]), np.array([s.seconds for s in gathers])
    )
    bandwidth = 1.0 / max(per_byte, SMALL)
    slower = [
        sample.seconds / float(np.dot(features(sample), (latency, per_byte)))
        for sample in samples
        if sample.reduces
    ]
    found = replace(given, intra_latency_s=latency, reduce_factor=median(slower or [given.reduce_factor]))
    return replace(kind, intra_bandwidth=bandwidth, inter_bandwidth=bandwidth), found


def fit_forward(
    samples: Sequence[PassSample], kind: DeviceKind, given: Calibration, space: SearchSpace
) -> Calibration:
    """Seconds per FLOP, per byte of element-wise traffic, per layer and micro-batch, and per micro-batch."""
    features = np.array([_forward_features(sample, space) for sample in samples])
    reading = kind.memory_bandwidth * given.bandwidth_efficiency
    heads = [
        sample.micro_batches * space.parameter_bytes * sample.model.head_parameters / reading
        for sample in samples
    ]
    targets = np.array(
        [sample.seconds - given.call_overhead_s - head for sample, head in zip(samples, heads, strict=True)]
    )
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
    """The same sums that passes.inference_time makes, but for the head's weights (and without weights being
    the bottleneck)."""
    model = sample.model
    length = sample.prompt + sample.response
    tokens, scored = sample.rows * length, sample.rows * sample.response
    flops = model.num_layers * layer_flops(model, tokens, length / 2) + 2.0 * scored * model.head_parameters
    width = 1 if model.scalar_head else model.vocab_size
    traffic = model.num_layers * 2.0 * space.activation_bytes * model.activation_elements_per_token * tokens
    traffic += 8.0 * scored * width
    return flops, traffic, float(model.num_layers * sample.micro_batches), float(sample.micro_batches)


def fit_training(
    samples: Sequence[PassSample], kind: DeviceKind, given: Calibration, space: SearchSpace
) -> Calibration:
    """The backward factor, and the bandwidth of the optimizer and of adding up gradients: training seconds
    are linear in the first and in the reciprocal of the second."""

    def seconds(backward_factor: float, per_byte: float) -> np.ndarray:
        tried = replace(given, backward_factor=backward_factor, update_efficiency=1.0 / max(per_byte, SMALL))
        return np.array([predicted_pass(sample, kind, tried, space) for sample in samples])

    none = seconds(0.0, 0.0)
    features = np.stack([seconds(1.0, 0.0) - none, seconds(0.0, 1.0) - none], axis=1)
    measured = np.array([sample.seconds for sample in samples])
    factor, per_byte = nonnegative_least_squares(features, measured - none, 1.0 / measured)
    return replace(given, backward_factor=factor, update_efficiency=1.0 / max(per_byte, 1e-3))


def fit_shared(
    samples: Sequence[PassSample], kind: DeviceKind, given: Calibration, space: SearchSpace
) -> Calibration:
    """What an engine reaches of the links: it moves many tensors, copies them before and after, and ranks
    wait for each other."""

    def seconds(efficiency: float) -> np.ndarray:
        tried = replace(given, link_efficiency=efficiency)
        return np.array([predicted_pass(sample, kind, tried, space) for sample in samples])

    free = seconds(1.0 / SMALL)
    measured = np.array([sample.seconds for sample in samples])
    slower = nonnegative_least_squares((seconds(1.0) - free)[:, None], measured - free, 1.0 / measured)[0]
    return replace(given, link_efficiency=1.0 / max(slower, 1e-3))


def fit_decoding(
    samples: Sequence[GenerationSample], kind: DeviceKind, given: Calibration, space: SearchSpace
) -> Calibration:
    """What reading weights and caches reaches and what products reach (by a coarse and a fine grid, because a
    step is bound by one or the other), and for each pair the host's seconds per decode step, per layer of a
    step, and per running sequence of a step."""
    readings, products = np.geomspace(*EFFICIENCIES), np.geomspace(*DECODE_PRODUCTS) * given.matmul_efficiency
    coarse = [
        _decoding(samples, kind, given, space, *pair)
        for pair in product(readings.tolist(), products.tolist())
    ]
    best = min(coarse, key=lambda pair: pair[0])
    reading, multiplying = best[1].bandwidth_efficiency, best[1].decode_matmul_efficiency
    wide, high = readings[1] / readings[0], products[1] / products[0]
    finer = product(
        np.geomspace(reading / wide, reading * wide, 15).tolist(),
        np.geomspace(multiplying / high, min(multiplying * high, given.matmul_efficiency), 15).tolist(),
    )
    return min(
        (best, *(_decoding(samples, kind, given, space, *pair) for pair in finer)), key=lambda pair: pair[0]
    )[1]


def _decoding(
    samples: Sequence[GenerationSample],
    kind: DeviceKind,
    given: Calibration,
    space: SearchSpace,
    reading: float,
    multiplying: float,
) -> tuple[float, Calibration]:
    """(sum of squared relative errors, constants) with the overheads that are best for these two
    efficiencies."""
    bare = replace(
        given,
        bandwidth_efficiency=reading,
        decode_matmul_efficiency=multiplying,
        decode_step_overhead_s=0.0,
        decode_layer_overhead_s=0.0,
        decode_row_overhead_s=0.0,
    )
    features = np.array(
        [
            (sample.response, sample.response * sample.model.num_layers, sample.response * sample.rows)
            for sample in samples
        ],
        dtype=float,
    )
    targets = np.array(
        [sample.seconds - predicted_generation(sample, kind, bare, space) for sample in samples]
    )
    weights = 1.0 / np.array([sample.seconds for sample in samples])
    step, layer, row = nonnegative_least_squares(features, targets, weights)
    off = (features @ np.array([step, layer, row]) - targets) * weights
    return float(off @ off), replace(
        bare, decode_step_overhead_s=step, decode_layer_overhead_s=layer, decode_row_overhead_s=row
    )


def fit_syncs(
    samples: Sequence[SyncSample], kind: DeviceKind, given: Calibration, space: SearchSpace
) -> Calibration:
    """Fixed seconds of a sync and seconds per parameter, beyond the copy."""
    bare = replace(given, sync_overhead_s=0.0, sync_parameter_s=0.0)
    targets = np.array([sample.seconds - predicted_sync(sample, kind, bare, space) for sample in samples])
    features = np.array([(1.0, sample.model.num_parameters) for sample in samples])
    fixed, per_parameter = nonnegative_least_squares(
        features, targets, 1.0 / np.array([sample.seconds for sample in samples])
    )
    return replace(given, sync_overhead_s=fixed, sync_parameter_s=per_parameter)


def predicted_sync(
    sample: SyncSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """What options.entry_seconds says for one device."""
    copied = (
        0.0
        if space.shared_generation_weights
        else 2.0 * space.parameter_bytes / (kind.memory_bandwidth * calibration.bandwidth_efficiency)
    )
    return calibration.sync_overhead_s + (calibration.sync_parameter_s + copied) * sample.model.num_parameters


def predicted_pass(
    sample: PassSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """What the simulators say to a measured pass."""
    length = sample.prompt + sample.response
    workload = Workload(
        batch_size=sample.rows, prompt=Lengths.fixed(sample.prompt), response=Lengths.fixed(sample.response)
    )
    tokens = -(-sample.rows * length // (sample.micro_batches * sample.ranks))
    layout = ModelLayout(d=sample.ranks, zero=2 if sample.ranks > 1 else 0, micro_batch_tokens=tokens)
    machine = Machine(kind, calibration, space, workload)
    if sample.training:
        return training_time(sample.model, layout, machine).total
    return inference_time(sample.model, layout, machine, trained=True).total


def predicted_generation(
    sample: GenerationSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """What the simulator says to a measured generation call."""
    workload = Workload(
        batch_size=sample.rows, prompt=Lengths.fixed(sample.prompt), response=Lengths.fixed(sample.response)
    )
    machine = Machine(kind, calibration, space, workload)
    return generation_time(sample.model, GenerationLayout(max_running=sample.rows), machine).total


def nonnegative_least_squares(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
) -> list[float]:
    """x >= 0 with the least sum of squares of weights * (features x - targets); weights default to 1/targets
    (relative errors).

    Exact by trying every subset of columns that may be positive (there are at most four): the optimum is the
    unconstrained solution of its own support (Lawson and Hanson 1974, chapter 23).
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
