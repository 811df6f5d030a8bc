"""Fitting: constants that made the measurements are found again; the solver against scipy-free
brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.answer.judge import judge
from hybridflow.mapping.calibrate.compare import Run
from hybridflow.mapping.calibrate.fit import (
    fit,
    nonnegative_least_squares,
    predicted_generation,
    predicted_pass,
    refine,
)
from hybridflow.mapping.calibrate.measurements import (
    CollectiveSample,
    GenerationSample,
    Measurements,
    PassSample,
)
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.search.search import search

SPACE = SearchSpace(shared_generation_weights=False)
TRUTH = Calibration(
    name="truth",
    matmul_efficiency=0.4,
    bandwidth_efficiency=0.6,
    backward_factor=2.3,
    layer_overhead_s=3e-4,
    micro_batch_overhead_s=2e-3,
    decode_layer_overhead_s=2e-4,
    decode_step_overhead_s=1e-3,
    decode_row_overhead_s=4e-5,
    call_overhead_s=0.01,
    link_efficiency=0.7,
    reduce_factor=1.9,
    intra_latency_s=2e-4,
    update_efficiency=0.5,
    decode_matmul_efficiency=0.2,
)
KIND = DeviceKind(
    name="truth",
    memory_bytes=8e9,
    flops=5e11,
    memory_bandwidth=1e10,
    intra_bandwidth=5e8,
    inter_bandwidth=5e8,
    host_bandwidth=1e10,
    devices_per_node=2,
)


def models() -> list[ModelSpec]:
    return [
        ModelSpec(
            name=str(hidden),
            num_layers=layers,
            hidden_size=hidden,
            num_heads=hidden // 32,
            num_kv_heads=hidden // 32,
            head_dim=32,
            intermediate_size=3 * hidden,
            vocab_size=4096,
        )
        for layers, hidden in ((4, 192), (6, 320), (12, 384), (8, 512))
    ]


def measurements() -> Measurements:
    """What a machine would show on which the simulators are exactly right."""
    passes, generations = [], []
    for model in models()[1:]:
        sample = PassSample(
            model=model,
            rows=64,
            prompt=8,
            response=56,
            micro_batches=1,
            training=True,
            seconds=0.0,
            ranks=2,
        )
        passes.append(replace(sample, seconds=predicted_pass(sample, KIND, TRUTH, SPACE)))
    for model, rows, micro_batches, training in product(models(), (16, 64), (1, 4), (False, True)):
        sample = PassSample(
            model=model,
            rows=rows,
            prompt=8,
            response=56,
            micro_batches=micro_batches,
            training=training,
            seconds=0.0,
        )
        passes.append(replace(sample, seconds=predicted_pass(sample, KIND, TRUTH, SPACE)))
    for model, rows, response in product(models(), (8, 64), (32, 64)):
        drawn = GenerationSample(model=model, rows=rows, prompt=8, response=response, seconds=0.0)
        generations.append(replace(drawn, seconds=predicted_generation(drawn, KIND, TRUTH, SPACE)))
    collectives = tuple(
        CollectiveSample(num_bytes=size, ranks=2, seconds=2e-4 + size / 2 / 5e8)
        for size in (1e4, 1e6, 1e8)
    )
    collectives += tuple(
        replace(sample, seconds=1.9 * sample.seconds, reduces=True) for sample in collectives[1:]
    )
    return Measurements(
        name="truth",
        num_processes=2,
        memory_bytes=8e9,
        compute_bytes=2,
        matmul_flops=5e11,
        memory_bandwidth=1e10,
        passes=tuple(passes),
        generations=tuple(generations),
        collectives=collectives,
        call_s=0.01,
    )


def test_the_constants_that_made_the_measurements_are_found():
    found = fit(measurements(), space=SPACE)
    overheads = [
        name
        for name in Calibration.__dataclass_fields__
        if name.endswith("_overhead_s") and name != "call_overhead_s"
    ]
    efficiencies = [
        name for name in Calibration.__dataclass_fields__ if name.endswith("_efficiency")
    ]
    for name in ("backward_factor", "intra_latency_s", *efficiencies, *overheads):
        assert getattr(found.calibration, name) == pytest.approx(getattr(TRUTH, name), rel=0.02), (
            name
        )
    assert found.kind.intra_bandwidth == pytest.approx(5e8, rel=1e-6)
    assert found.calibration.reduce_factor == pytest.approx(1.9)
    assert max(largest for _, largest in found.errors.values()) < 0.01


@pytest.mark.slow
def test_noise_moves_predictions_little():
    exact = measurements()
    noise = np.random.default_rng(0)
    noisy = replace(
        exact,
        passes=tuple(
            replace(sample, seconds=sample.seconds * noise.uniform(0.9, 1.1))
            for sample in exact.passes
        ),
    )
    found = fit(noisy, space=SPACE)
    for sample in exact.passes:
        assert predicted_pass(sample, found.kind, found.calibration, SPACE) == pytest.approx(
            sample.seconds, rel=0.15
        )


def test_solver_equals_projected_gradient():
    draw = np.random.default_rng(1)
    for _ in range(6):
        features = draw.uniform(0, 1, (12, 3))
        targets = draw.uniform(0.5, 1, 12) - draw.uniform(0, 1) * 0.4
        solution = np.array(nonnegative_least_squares(features, targets, np.ones(12)))
        point = np.zeros(3)
        for _ in range(10_000):
            point = np.maximum(0, point - 0.02 * features.T @ (features @ point - targets))
        assert solution == pytest.approx(point, abs=1e-4)


def test_real_runs_add_their_fixed_overheads(paper_setting):
    setting = paper_setting("llama-7b", 8)
    mapping = mapping_of(setting, search(setting).best)
    extra = {"inference": 0.5, "generation": 2.5, "training": 0.5}
    measured = {
        call.call: call.seconds + extra[call.kind] for call in mapping.calls if call.kind in extra
    }
    found = refine(
        setting.calibration,
        [Run(configuration="a", mapping=mapping, measured_s=measured, step_s=1.0)],
    )
    assert found.call_ranks_s == pytest.approx(0.5)
    assert found.sync_ranks_s == pytest.approx(2.0)
    assert (found.call_overhead_s, found.sync_overhead_s) == (
        setting.calibration.call_overhead_s,
        setting.calibration.sync_overhead_s,
    )
    again = judge(replace(setting, calibration=found), mapping).mapping
    assert {
        call.call: call.seconds for call in again.calls if call.call in measured
    } == pytest.approx(measured)


def test_measurements_and_constants_survive_their_files(tmp_path):
    seen = measurements()
    seen.save(tmp_path / "measurements.json")
    assert Measurements.load(tmp_path / "measurements.json") == seen
    TRUTH.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == TRUTH
    (tmp_path / "wrong.json").write_text('{"matmul_eficiency": 0.5}')
    with pytest.raises(ValueError, match="matmul_eficiency"):
        Calibration.load(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match="backward_factor"):
        Calibration(backward_factor=-1)
