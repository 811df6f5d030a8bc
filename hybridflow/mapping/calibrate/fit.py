"""fit: constants from measurements, by least squares on relative errors with no constant below 0.

The simulators are linear in the constants (seconds per FLOP, per byte, per layer, per micro-batch,
per decode step, per running sequence), so each fit is one small non-negative problem, solved
exactly. Pure NumPy; the measuring is done by recipes/calibrate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from statistics import median
from typing import TypeVar

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
from hybridflow.mapping.simulate.compute import head_width, layer_flops
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.passes import Machine, inference_time, training_time
from hybridflow.mapping.simulate.schedule import CONTROLLER

Sample = TypeVar("Sample", PassSample, GenerationSample, SyncSample)
SMALL = 1e-12
EFFICIENCIES = (0.1, 8.0, 45)
"""Fractions of the copying bandwidth at which weights and caches may be read: over 1 where they
stay in a processor's cache."""
DECODE_PRODUCTS = (0.1, 1.0, 12)
"""Fractions of matmul_efficiency that products with few rows may reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The device kind and the constants that explain the measurements, and how well they do."""

    kind: DeviceKind
    calibration: Calibration
    errors: dict[str, tuple[float, float]]
    """Kind of samples -> (median, largest) relative error of the fit."""


def fit(
    measurements: Measurements, *, space: SearchSpace, calibration: Calibration | None = None
) -> Fit:
    """Constants for planning on machines like the measured one; constants that nothing was
    measured for are those of `calibration`."""
    initial = calibration or Calibration()
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
    fitted = replace(
        initial,
        name=measurements.name,
        call_overhead_s=measurements.call_s,
        intra_latency_s=0.0,
        link_efficiency=1.0,
    )
    errors: dict[str, tuple[float, float]] = {}
    if measurements.collectives:
        kind, fitted = fit_links(measurements.collectives, kind, fitted)
    forward, training, shared = [], [], []
    for sample in measurements.passes:
        if sample.ranks > 1:
            shared.append(sample)
        elif sample.training:
            training.append(sample)
        else:
            forward.append(sample)
    # Each of the two needs a constant of the other: the head's weights are read in both.
    for _ in range(2):
        if forward:
            fitted = fit_forward(forward, kind, fitted, space)
        if measurements.generations:
            fitted = fit_decoding(measurements.generations, kind, fitted, space)
    if forward:
        errors["forward"] = _errors(predicted_pass, forward, kind, fitted, space)
    if training:
        fitted = fit_training(training, kind, fitted, space)
        errors["training"] = _errors(predicted_pass, training, kind, fitted, space)
    if shared:
        fitted = fit_shared(shared, kind, fitted, space)
        errors["training on several ranks"] = _errors(predicted_pass, shared, kind, fitted, space)
    if measurements.generations:
        errors["generation"] = _errors(
            predicted_generation, measurements.generations, kind, fitted, space
        )
    if measurements.syncs:
        fitted = fit_syncs(measurements.syncs, kind, fitted, space)
        errors["sync"] = _errors(predicted_sync, measurements.syncs, kind, fitted, space)
    return Fit(kind=kind, calibration=fitted, errors=errors)


def refine(calibration: Calibration, runs: Sequence[Run]) -> Calibration:
    """The overheads that only real runs have, from runs in a single pool that were predicted with
    `calibration`, as medians and never below 0.

    In pools of one rank the seconds of forward calls beyond their prediction are the overhead of
    every call, and those of generation beyond that the overhead of a sync. In pools of several
    ranks they are the time that the ranks cost each other, so that runs on one rank come first.
    Functions get their measured seconds. The time between a step's calls goes to its controller
    function; it includes handing over columns, which go through the node's object store whether
    pools differ or not, so that different pools add no overhead.
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
            "runs: some in pools of one rank, some in pools of several; refine with those of one "
            "rank first, then the others"
        )
    per_call, per_sync = "call_overhead_s", "sync_overhead_s"
    if several.pop():
        per_call, per_sync = "call_ranks_s", "sync_ranks_s"
    before = asdict(calibration)
    call_s = max(median(beyond[CallKind.inference] or [0.0]), -before[per_call])
    sync_s = max(median(beyond[CallKind.generation] or [0.0]) - call_s, -before[per_sync])
    refined = replace(
        calibration, **{per_call: before[per_call] + call_s, per_sync: before[per_sync] + sync_s}
    )
    if functions:
        refined = replace(refined, function_s=median(functions))
    if between:
        refined = replace(refined, controller_s=max(0.0, median(between)), transfer_overhead_s=0.0)
    return refined


def fit_links(
    samples: Sequence[CollectiveSample], kind: DeviceKind, initial: Calibration
) -> tuple[DeviceKind, Calibration]:
    """seconds = latency log2(ranks) + bytes (ranks - 1)/ranks / bandwidth; a reduce-scatter takes
    `reduce_factor` times as long."""

    def features(sample: CollectiveSample) -> tuple[float, float]:
        return float(np.log2(sample.ranks)), sample.num_bytes * (sample.ranks - 1) / sample.ranks

    gathers, rows = [], []
    for sample in samples:
        if not sample.reduces:
            gathers.append(sample)
            rows.append(features(sample))
    latency, per_byte = nonnegative_least_squares(np.array(rows), _seconds(gathers))
    bandwidth = 1.0 / max(per_byte, SMALL)
    slower: list[float] = []
    for sample in samples:
        if sample.reduces:
            slower.append(sample.seconds / float(np.dot(features(sample), (latency, per_byte))))
    fitted = replace(initial, intra_latency_s=latency)
    if slower:
        fitted = replace(fitted, reduce_factor=median(slower))
    return replace(kind, intra_bandwidth=bandwidth, inter_bandwidth=bandwidth), fitted


def fit_forward(
    samples: Sequence[PassSample], kind: DeviceKind, initial: Calibration, space: SearchSpace
) -> Calibration:
    """Seconds per FLOP, per byte of element-wise traffic, per layer and micro-batch, and per
    micro-batch."""
    reading = kind.memory_bandwidth * initial.bandwidth_efficiency
    features, targets = [], []
    for sample in samples:
        head = sample.micro_batches * space.parameter_bytes * sample.model.head_parameters / reading
        features.append(_forward_features(sample, space))
        targets.append(sample.seconds - initial.call_overhead_s - head)
    per_flop, per_byte, per_layer, per_micro_batch = nonnegative_least_squares(
        np.array(features), np.array(targets), 1.0 / _seconds(samples)
    )
    return replace(
        initial,
        matmul_efficiency=1.0 / max(per_flop * kind.flops, SMALL),
        elementwise_efficiency=1.0 / max(per_byte * kind.memory_bandwidth, 1e-3),
        layer_overhead_s=per_layer,
        micro_batch_overhead_s=per_micro_batch,
    )


def _forward_features(sample: PassSample, space: SearchSpace) -> tuple[float, float, float, float]:
    """The sums that passes.inference_time makes, without the head's weights (and without
    weights being the bottleneck)."""
    model = sample.model
    length = sample.prompt + sample.response
    tokens, scored = sample.rows * length, sample.rows * sample.response
    flops = (
        model.num_layers * layer_flops(model, tokens, length / 2)
        + 2.0 * scored * model.head_parameters
    )
    traffic = (
        model.num_layers
        * 2.0
        * space.activation_bytes
        * model.activation_elements_per_token
        * tokens
    )
    traffic += 8.0 * scored * head_width(model)
    return (
        flops,
        traffic,
        float(model.num_layers * sample.micro_batches),
        float(sample.micro_batches),
    )


def fit_training(
    samples: Sequence[PassSample], kind: DeviceKind, initial: Calibration, space: SearchSpace
) -> Calibration:
    """The backward factor, and the bandwidth of the optimizer and of adding up gradients:
    training seconds are linear in the first and in the reciprocal of the second."""

    def seconds(backward_factor: float, per_byte: float) -> np.ndarray:
        efficiency = 1.0 / max(per_byte, SMALL)
        tried = replace(initial, backward_factor=backward_factor, update_efficiency=efficiency)
        return _predictions(predicted_pass, samples, kind, tried, space)

    none = seconds(0.0, 0.0)
    features = np.stack([seconds(1.0, 0.0) - none, seconds(0.0, 1.0) - none], axis=1)
    measured = _seconds(samples)
    factor, per_byte = nonnegative_least_squares(features, measured - none, 1.0 / measured)
    return replace(initial, backward_factor=factor, update_efficiency=1.0 / max(per_byte, 1e-3))


def fit_shared(
    samples: Sequence[PassSample], kind: DeviceKind, initial: Calibration, space: SearchSpace
) -> Calibration:
    """The fraction of the links that an engine reaches: it moves many tensors, copies them
    before and after, and ranks wait for each other."""

    def seconds(efficiency: float) -> np.ndarray:
        tried = replace(initial, link_efficiency=efficiency)
        return _predictions(predicted_pass, samples, kind, tried, space)

    free = seconds(1.0 / SMALL)
    measured = _seconds(samples)
    slower = nonnegative_least_squares(
        (seconds(1.0) - free)[:, None], measured - free, 1.0 / measured
    )[0]
    return replace(initial, link_efficiency=1.0 / max(slower, 1e-3))


def fit_decoding(
    samples: Sequence[GenerationSample], kind: DeviceKind, initial: Calibration, space: SearchSpace
) -> Calibration:
    """The efficiencies of reading weights and caches and of products (by a coarse and a fine
    grid, because a step is bound by either of them), and for each pair the host's seconds per
    decode step, per layer of a step, and per running sequence of a step."""
    readings = np.geomspace(*EFFICIENCIES)
    products = np.geomspace(*DECODE_PRODUCTS) * initial.matmul_efficiency
    best_error, best = float("inf"), initial
    for pair in product(readings.tolist(), products.tolist()):
        error, tried = _decoding(samples, kind, initial, space, *pair)
        if error < best_error:
            best_error, best = error, tried
    reading, multiplying = best.bandwidth_efficiency, best.decode_matmul_efficiency
    wide, high = readings[1] / readings[0], products[1] / products[0]
    most = min(multiplying * high, initial.matmul_efficiency)
    readings = np.geomspace(reading / wide, reading * wide, 15)
    products = np.geomspace(multiplying / high, most, 15)
    for pair in product(readings.tolist(), products.tolist()):
        error, tried = _decoding(samples, kind, initial, space, *pair)
        if error < best_error:
            best_error, best = error, tried
    return best


def _decoding(
    samples: Sequence[GenerationSample],
    kind: DeviceKind,
    initial: Calibration,
    space: SearchSpace,
    reading: float,
    multiplying: float,
) -> tuple[float, Calibration]:
    """(sum of squared relative errors, constants) with the overheads that are best for these two
    efficiencies."""
    bare = replace(
        initial,
        bandwidth_efficiency=reading,
        decode_matmul_efficiency=multiplying,
        decode_step_overhead_s=0.0,
        decode_layer_overhead_s=0.0,
        decode_row_overhead_s=0.0,
    )
    rows, weights = [], 1.0 / _seconds(samples)
    for sample in samples:
        layers, running = sample.model.num_layers, sample.rows
        rows.append((sample.response, sample.response * layers, sample.response * running))
    features = np.array(rows, dtype=float)
    targets = _seconds(samples) - _predictions(predicted_generation, samples, kind, bare, space)
    step, layer, row = nonnegative_least_squares(features, targets, weights)
    off = (features @ np.array([step, layer, row]) - targets) * weights
    overheads = replace(
        bare, decode_step_overhead_s=step, decode_layer_overhead_s=layer, decode_row_overhead_s=row
    )
    return float(off @ off), overheads


def fit_syncs(
    samples: Sequence[SyncSample], kind: DeviceKind, initial: Calibration, space: SearchSpace
) -> Calibration:
    """Fixed seconds of a sync and seconds per parameter, beyond the copy."""
    bare = replace(initial, sync_overhead_s=0.0, sync_parameter_s=0.0)
    targets = _seconds(samples) - _predictions(predicted_sync, samples, kind, bare, space)
    features = np.array([(1.0, sample.model.num_parameters) for sample in samples])
    fixed, per_parameter = nonnegative_least_squares(features, targets, 1.0 / _seconds(samples))
    return replace(initial, sync_overhead_s=fixed, sync_parameter_s=per_parameter)


def predicted_sync(
    sample: SyncSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """Seconds that options.entry_seconds predicts for a measured sync."""
    per_parameter = calibration.sync_parameter_s
    if not space.shared_generation_weights:
        reading = kind.memory_bandwidth * calibration.bandwidth_efficiency
        per_parameter += 2.0 * space.parameter_bytes / reading
    return calibration.sync_overhead_s + per_parameter * sample.model.num_parameters


def predicted_pass(
    sample: PassSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """Seconds that the simulators predict for a measured pass."""
    length = sample.prompt + sample.response
    tokens = -(-sample.rows * length // (sample.micro_batches * sample.ranks))
    layout = ModelLayout(
        d=sample.ranks, zero=2 if sample.ranks > 1 else 0, micro_batch_tokens=tokens
    )
    machine = Machine(kind, calibration, space, _workload(sample))
    if sample.training:
        return training_time(sample.model, layout, machine).total
    return inference_time(sample.model, layout, machine, trained=True).total


def predicted_generation(
    sample: GenerationSample, kind: DeviceKind, calibration: Calibration, space: SearchSpace
) -> float:
    """Seconds that the simulator predicts for a measured generation call."""
    machine = Machine(kind, calibration, space, _workload(sample))
    return generation_time(sample.model, GenerationLayout(max_running=sample.rows), machine).total


def _workload(sample: PassSample | GenerationSample) -> Workload:
    prompt, response = Lengths.fixed(sample.prompt), Lengths.fixed(sample.response)
    return Workload(batch_size=sample.rows, prompt=prompt, response=response)


def nonnegative_least_squares(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
) -> list[float]:
    """x >= 0 with the least sum of squares of weights * (features x - targets); weights default to
    1/targets (relative errors).

    Exact by trying every subset of columns that may be positive (there are at most four): the
    optimum is the unconstrained solution of its own support (Lawson and Hanson 1974, chapter 23).
    """
    if weights is None:
        weights = 1.0 / np.maximum(np.abs(targets), SMALL)
    scaled, goal = features * weights[:, None], targets * weights
    size = features.shape[1]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    best, solution = float(goal @ goal), np.zeros(size)
    for count in range(1, size + 1):
        for support in combinations(range(size), count):
            columns = list(support)
            part = (
                np.linalg.lstsq(scaled[:, columns] / norms[columns], goal, rcond=None)[0]
                / norms[columns]
            )
            if (part < 0).any():
                continue
            residual = float(((scaled[:, columns] @ part - goal) ** 2).sum())
            if residual < best * (1 - 1e-9):
                best, solution = residual, np.zeros(size)
                solution[columns] = part
    return solution.tolist()


def _seconds(
    samples: Sequence[PassSample | GenerationSample | CollectiveSample | SyncSample],
) -> np.ndarray:
    """[samples]: the measured seconds."""
    return np.array([sample.seconds for sample in samples])


def _predictions(
    predict: Callable[[Sample, DeviceKind, Calibration, SearchSpace], float],
    samples: Sequence[Sample],
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
) -> np.ndarray:
    """[samples]: the seconds that `predict` gives for each."""
    return np.array([predict(sample, kind, calibration, space) for sample in samples])


def _errors(
    predict: Callable[[Sample, DeviceKind, Calibration, SearchSpace], float],
    samples: Sequence[Sample],
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
) -> tuple[float, float]:
    """(median, largest) of |predicted / measured - 1|."""
    ratios = _predictions(predict, samples, kind, calibration, space) / _seconds(samples)
    off = np.sort(np.abs(ratios - 1.0))
    return float(off[len(off) // 2]), float(off[-1])
