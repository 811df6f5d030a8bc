"""Settings of the decoder layers, and replicas, in the mapper: bytes and seconds in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.simulate.footprint import state_footprint
from hybridflow.mapping.simulate.moments import training_moments
from hybridflow.mapping.simulate.passes import training_time
from recipes.mapping_settings import train_layout
from tests.mapping.test_simulators import A100, LLAMA, WORKLOAD, machine
from workers.config import TrainConfig

TOKENS = 8192
NONE = ModelLayout(micro_batch_tokens=TOKENS)
WHOLE = replace(NONE, recompute=True)
SELECTIVE = replace(WHOLE, selective=True)


def activations(layout: ModelLayout) -> float:
    """Bytes for each token of the micro-batch, when the layers' backward pass begins."""
    moments = training_moments(LLAMA, layout, SearchSpace(), WORKLOAD, 1)
    return moments["first"].activations / TOKENS


def test_what_is_kept_from_pass_to_pass() -> None:
    """In bfloat16: h, q, kv and f of a Llama layer, all of its layers or one."""
    h, q, kv, f = LLAMA.hidden_size, LLAMA.query_dim, LLAMA.kv_dim, LLAMA.intermediate_size
    layers = LLAMA.num_layers
    stored = 2 * (6 * h + 2 * q + 2 * kv + 4 * f) + 8 * h
    assert activations(NONE) == pytest.approx(layers * stored)
    assert activations(WHOLE) == pytest.approx(layers * 2 * h + stored)
    products = 2 * (3 * h + 2 * q + 2 * kv + 2 * f)
    assert activations(SELECTIVE) == pytest.approx(layers * products + stored)
    for layout in (NONE, WHOLE, SELECTIVE):
        assert activations(replace(layout, offload_activations=True)) == pytest.approx(stored)
    compiled = 2 * (4 * h + 2 * q + 2 * kv + 3 * f) + 4 * h
    assert activations(replace(NONE, compiled=True)) == pytest.approx(layers * compiled)


def test_what_is_computed_again_and_copied() -> None:
    seconds = {
        name: training_time(LLAMA, layout, machine())
        for name, layout in (("none", NONE), ("whole", WHOLE), ("selective", SELECTIVE))
    }
    assert seconds["none"].compute < seconds["selective"].compute < seconds["whole"].compute
    again = seconds["whole"].compute - seconds["none"].compute
    assert seconds["selective"].compute - seconds["none"].compute < 0.2 * again
    slow = replace(machine(), kind=replace(A100, host_bandwidth=1e9))
    on_host = training_time(LLAMA, replace(NONE, offload_activations=True), slow)
    assert on_host.offload > 0 and on_host.compute == training_time(LLAMA, NONE, slow).compute
    fast = replace(machine(), kind=replace(A100, host_bandwidth=1e15))
    assert training_time(LLAMA, replace(NONE, offload_activations=True), fast).offload == 0


def test_replicas_hold_as_many_times_more() -> None:
    space = SearchSpace(cut_between_steps=True)
    plain, hybrid = ModelLayout(d=8, zero=3), ModelLayout(d=8, zero=3, replicas=2)
    assert hybrid.shards == 4 and hybrid.num_devices == 8
    one, two = (
        state_footprint(LLAMA, layout, space, trained=True).optimizer for layout in (plain, hybrid)
    )
    assert two == pytest.approx(2 * one)


def test_a_run_shows_its_settings() -> None:
    train = TrainConfig(
        fsdp_replicas=2,
        activation_checkpointing=True,
        selective_checkpointing=True,
        offload_activations=True,
        micro_batch_tokens=512,
    )
    layout = str(train_layout(train, 8, trained=True))
    assert layout == "1-1-8 ZeRO-2 2 replicas selective recompute activations on host"
    assert str(train_layout(replace(train, compile=True), 8, trained=False)).endswith("compiled")
