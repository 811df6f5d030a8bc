"""Adapters in the mapper: bytes and seconds by hand, against an engine's memory, and bases that roles
share."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridflow.context import RankContext
from hybridflow.local_pool import LocalPool
from hybridflow.mapping.answer.device_mapping import Pool, RolePlan
from hybridflow.mapping.answer.predict import predict
from hybridflow.mapping.question.adapter import AdapterSpec
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.simulate.footprint import resident_footprint, state_footprint
from hybridflow.mapping.simulate.passes import Machine, training_time
from hybridflow.mapping.simulate.transition import transition_time, weight_sync_time
from recipes.dataflows import PAPER
from recipes.mapping_adapters import adapter_spec
from tests.engines.threed_cases import loss_fn, make_sequences, save_tiny_model
from tests.matrix import matrix
from workers.config import LoraConfig, ModelConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head

LLAMA = MODELS["llama-7b"]
RANK = 16
PER_LAYER = RANK * (4 * (4096 + 4096) + 2 * (4096 + 11008) + (11008 + 4096))
"""Parameters of A and B in a layer: q, k, v, o; gate and up; down."""
WHOLE = RANK * (3 * 4096 + 2 * 4096 + 2 * 4096)
"""Those that every tensor rank has: A of q, k, v, gate and up, B of o and down."""
FSDP = SearchSpace(cut_between_steps=True)


def test_sizes_by_hand() -> None:
    adapted = LLAMA.with_adapter(RANK)
    assert adapted.adapter == AdapterSpec(whole=WHOLE, cut=PER_LAYER - WHOLE)
    assert adapted.adapter_parameters == 32 * PER_LAYER == 39_976_960
    assert adapted.num_parameters == LLAMA.num_parameters


def test_states_are_the_adapters_alone() -> None:
    """ZeRO-1 (engine threed) on 2 x 2 x 4: base in bf16; weights, gradients and states of A and B."""
    layout = ModelLayout(p=2, t=2, d=4, zero=1)
    full = state_footprint(LLAMA, layout, SearchSpace(), trained=True)
    state = state_footprint(LLAMA.with_adapter(RANK), layout, SearchSpace(), trained=True)
    count = 16 * (WHOLE + (PER_LAYER - WHOLE) / 2)
    assert state.parameters == full.parameters + 2 * count
    assert state.gradients == 4 * count
    assert state.optimizer == 12 * count / 4


@pytest.mark.parametrize("devices", [1, 8])
def test_fsdp_keeps_the_base_in_bf16(devices: int) -> None:
    layout = ModelLayout(d=devices, zero=2)
    state = resident_footprint(LLAMA.with_adapter(RANK), layout, FSDP, trained=True)
    count, gathered = 32 * PER_LAYER, 0.0
    if devices == 1:
        gathered = 2 * count
    assert state.parameters == (2 * LLAMA.num_parameters + 4 * count) / devices + gathered
    assert state.optimizer == 8 * count / devices
    assert state.gradients == 0


def test_a_sync_sends_the_adapters_bytes() -> None:
    """Time of the bytes alone: as many times less as the adapter is smaller than the model."""
    free = Calibration(
        intra_latency_s=0, inter_latency_s=0, sync_overhead_s=0, sync_ranks_s=0, sync_parameter_s=0
    )
    workload = Workload(batch_size=8, prompt=Lengths.fixed(8), response=Lengths.fixed(8))
    machine = Machine(DEVICE_KINDS["A100-80GB"], free, SearchSpace(), workload)
    training, generation = ModelLayout(t=8), GenerationLayout(tg=2, replicas=4)
    adapted = LLAMA.with_adapter(RANK)
    merged = LLAMA.with_adapter(RANK, sent_alone=False)
    share = adapted.adapter_parameters / LLAMA.num_parameters
    whole = transition_time(LLAMA, training, generation, machine)
    assert transition_time(adapted, training, generation, machine) == pytest.approx(whole * share)
    assert transition_time(merged, training, generation, machine) == whole
    apart = weight_sync_time(LLAMA, generation, machine)
    assert weight_sync_time(adapted, generation, machine) == pytest.approx(apart * share)


def test_a_frozen_layer_has_no_gradients_of_weights() -> None:
    """4 FLOPs a parameter and token in place of 6, and 6 for those of A and B (Hu et al. 2021,
    section 4.1)."""
    free = Calibration(
        layer_overhead_s=0,
        micro_batch_overhead_s=0,
        call_overhead_s=0,
        matmul_efficiency=1,
        bandwidth_efficiency=1,
        elementwise_efficiency=1,
        update_efficiency=1,
    )
    kind = replace(DEVICE_KINDS["A100-80GB"], memory_bandwidth=1e30)
    workload = Workload(batch_size=64, prompt=Lengths.fixed(0), response=Lengths.fixed(1024))
    machine = Machine(kind, free, SearchSpace(), workload)
    layout = ModelLayout(micro_batch_tokens=8192)
    full = training_time(LLAMA, layout, machine).compute
    adapted = training_time(LLAMA.with_adapter(RANK), layout, machine).compute
    layers = 32 * LLAMA.layer_parameters
    saved = 2 * layers + 2 * LLAMA.head_parameters - 6 * 32 * PER_LAYER
    assert full - adapted == pytest.approx(saved * 64 * 1024 / kind.flops, rel=1e-6)


@pytest.mark.parametrize("precision", matrix([Precision.bf16], [Precision.fp32]))
@pytest.mark.parametrize("engine", ["fsdp", "threed"])
def test_an_engines_memory(tmp_path: Path, engine: str, precision: Precision) -> None:
    """The bytes that an engine has between steps, within 15 % (issue 16)."""
    path = save_tiny_model(tmp_path / "model", "qwen3", layers=4)
    lora = LoraConfig(rank=2)
    config = TrainConfig(engine=engine, precision=precision, lora=lora)
    model = ModelConfig(path=str(path))
    learner = None
    with LocalPool():
        for _ in range(2):  # tables that all models share are there from the first one on
            del learner
            before = sum(memory_bytes().values())
            learner = engine_class(engine)(
                model=model, config=config, head=Head.lm, context=RankContext()
            )
            learner.train_step(make_sequences(), loss_fn, entropy=True)
            measured = sum(memory_bytes().values()) - before
    spec = replace(
        ModelSpec.from_directory(path), adapter=adapter_spec(model, lora, Head.lm, sent_alone=True)
    )
    space = SearchSpace(cut_between_steps=engine == "fsdp", zero_stages=(2,))
    if precision is Precision.fp32:
        space = replace(space, parameter_bytes=4.0, optimizer_bytes=8.0)
    predicted = resident_footprint(spec, ModelLayout(zero=1), space, trained=True).total
    assert predicted == pytest.approx(measured, rel=0.15)


def memory_bytes() -> dict[int, int]:
    """Bytes of every tensor's memory that is alive."""
    gc.collect()
    sizes = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, nn.Parameter):
            storage = value.untyped_storage()
            if value.device.type == "cpu":
                sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def sharing_setting(cluster: str, base: str) -> Setting:
    """PPO with adapters for actor and critic on one directory, and a reference without."""
    policy = LLAMA.with_adapter(RANK, base=base)
    critic = replace(policy.with_scalar_head(), base=base)
    return Setting(
        dataflow=PAPER["ppo"],
        models={
            "actor": policy,
            "reference": replace(LLAMA, base=base),
            "critic": critic,
            "reward": LLAMA.with_scalar_head(),
        },
        cluster=Cluster.parse(cluster),
        workload=Workload(batch_size=64, prompt=Lengths.fixed(256), response=Lengths.fixed(256)),
        space=SearchSpace(shared_generation_weights=False),
    )


def test_a_shared_base_is_counted_once() -> None:
    """The weights of three roles on one base in equal layouts are counted once, by hand; in another
    layout, or under another name, three times."""
    setting = sharing_setting("1x8xA100-80GB", "llama bf16")
    roles = ("actor", "reference", "critic", "reward")
    layout = ModelLayout(t=4, d=2)
    pools = [Pool(name="main", group=0, num_devices=8, roles=roles)]
    generation = GenerationLayout(tg=4, replicas=2, max_running=16)

    def parameters(setting: Setting, critic: ModelLayout, *sharing: str) -> float:
        expected = {"main": sharing} if sharing else {}
        plans = []
        for role in roles:
            plan = RolePlan(role=role, pool="main", layout=layout)
            if role == "actor":
                plan = replace(plan, generation=generation)
            if role == "critic":
                plan = replace(plan, layout=critic)
            plans.append(plan)
        mapping = predict(setting, pools, plans)
        assert mapping.sharing == expected
        return mapping.calls[-1].bytes["parameters"]

    once = parameters(setting, layout, "actor", "reference", "critic")
    apart = parameters(sharing_setting("1x8xA100-80GB", ""), layout)
    whole = 2 * LLAMA.num_parameters / 4
    scalar = 2 * LLAMA.with_scalar_head().num_parameters / 4
    assert apart - once == pytest.approx(whole + scalar)
    wider = parameters(setting, ModelLayout(t=8, d=1), "actor", "reference")
    assert wider > once + scalar / 2 - 1e7, "the critic's base is cut in another way"


def test_a_plan_that_fits_only_with_a_shared_base() -> None:
    """A device of 80 GB has room for the 13 B parameters of actor, reference, critic and reward once,
    beside those of generation, but not for every role."""
    for base, fits in (("llama bf16", True), ("", False)):
        setting = sharing_setting("1xA100-80GB", base)
        policy = MODELS["llama-13b"].with_adapter(RANK, base=base)
        models = {
            "actor": policy,
            "reference": replace(policy, adapter=None),
            "critic": policy.with_scalar_head(),
            "reward": policy.with_scalar_head(),
        }
        best = search(replace(setting, models=models)).best
        assert (best is not None) == fits
