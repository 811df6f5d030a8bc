"""The search against brute force over everything that it prunes: placements, device counts,
options, memory."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster, NodeGroup
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.search.options import role_options
from hybridflow.mapping.search.placements import packs, placements
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION, Setting, split_generation
from recipes.dataflows import PAPER


def brute_force(setting: Setting) -> float:
    """Least makespan over every placement, allocation and combination of raw options; inf if
    none fits."""
    sizes = [
        (number, size)
        for number, group in enumerate(setting.cluster.groups)
        for size in group.pool_sizes()
    ]
    options = {
        (role, *where): role_options(setting, role, *where)
        for role in setting.roles
        for where in sizes
    }
    best = float("inf")
    elsewhere = dict.fromkeys(CallKind, setting.calibration.function_s) | {
        CallKind.controller: setting.calibration.controller_s
    }
    for placement in placements(setting.roles):
        schedule = setting.schedule(
            {role: str(pool) for pool, roles in enumerate(placement) for role in roles}
        )
        for allocation in product(sizes, repeat=len(placement)):
            if not packs(setting.cluster, allocation):
                continue
            per_pool = [
                fitting(setting, options, roles, where)
                for roles, where in zip(placement, allocation, strict=True)
            ]
            for plan in product(*per_pool):
                seconds = {name: value for pool in plan for name, value in pool.items()}
                ordered = [
                    seconds[call.name] if call.name in seconds else elsewhere[call.kind]
                    for call in setting.dataflow.calls
                ]
                best = min(best, schedule.makespan(ordered))
    return best


def fitting(setting, options, roles, where) -> list[dict[str, float]]:
    """Seconds per call of every combination of options that fits into one pool."""
    result = []
    for chosen in product(*(options[(role, *where)] for role in roles)):
        if sum(option.resident for option in chosen) + max(
            option.transient for option in chosen
        ) <= setting.capacity(where[0]):
            result.append(
                {
                    call.name: value
                    for role, option in zip(roles, chosen, strict=True)
                    for call, value in zip(setting.calls(role), option.seconds, strict=True)
                }
            )
    return result


def random_model(draw: random.Random, name: str) -> ModelSpec:
    heads = draw.choice([4, 6, 8])
    return ModelSpec(
        name=name,
        num_layers=draw.choice([4, 6, 8]),
        hidden_size=128 * heads,
        num_heads=heads,
        num_kv_heads=draw.choice([heads, 2]),
        head_dim=128,
        intermediate_size=draw.choice([2048, 8192]),
        vocab_size=draw.choice([1000, 32000]),
    )


def random_setting(seed: int) -> Setting:
    """A few devices whose memory is between ample and too small, a few roles, a random
    dataflow's cut of PPO."""
    draw = random.Random(seed)
    algorithm = draw.choice(["ppo", "grpo", "remax"])
    dataflow = PAPER[algorithm]
    if algorithm == "ppo" and draw.random() < 0.8:
        dataflow = without_role(dataflow, draw.choice(["reward", "reference"]))
    weights_from = {}
    if algorithm == "grpo" and draw.random() < 0.5:
        dataflow, weights_from = (
            split_generation(without_role(dataflow, "reward")),
            {GENERATION: "actor"},
        )
    policy = random_model(draw, "policy")
    models = dict.fromkeys((*dataflow.roles, GENERATION), policy) | {
        "reward": random_model(draw, "reward"),
        "critic": policy.with_scalar_head(),
    }
    if draw.random() < 0.3:
        models["reference"] = None
    per_node = draw.choice([2, 3])
    kind = replace(
        DEVICE_KINDS["A100-80GB"],
        devices_per_node=per_node,
        memory_bytes=draw.uniform(3e9, 16e9),
        intra_bandwidth=10 ** draw.uniform(8, 11),
        inter_bandwidth=10 ** draw.uniform(8, 11),
    )
    calibration = Calibration(
        decode_step_overhead_s=10 ** draw.uniform(-6, -3),
        decode_layer_overhead_s=10 ** draw.uniform(-7, -5),
        decode_row_overhead_s=1e-6,
        call_overhead_s=0.0,
        controller_s=10 ** draw.uniform(-4, -1),
        layer_overhead_s=1e-6,
        micro_batch_overhead_s=1e-4,
    )
    groups = [NodeGroup(kind=kind, num_nodes=draw.choice([1, 2]) if per_node == 2 else 1)]
    if draw.random() < 0.3:
        other = replace(
            DEVICE_KINDS["H100-80GB"], devices_per_node=1, memory_bytes=draw.uniform(3e9, 16e9)
        )
        groups = [replace(groups[0], num_nodes=1), NodeGroup(kind=other, num_nodes=1)]
    space = SearchSpace(
        zero_stages=draw.choice([(1,), (1, 3)]),
        offload=draw.choice([(False,), (False, True)])
        if len(groups) == 1 and per_node == 2
        else (False,),
        recompute=draw.choice([(False, True), (True,)]),
        micro_batch_rows=draw.choice([(4,), (1, 8)]) if len(dataflow.roles) < 3 else (4,),
        waves=draw.choice([(1, 4), (1, 2, 8)]),
        shared_generation_weights=draw.random() < 0.5,
        max_generation_pipeline=1,
        bucket_bytes=1e8,
    )
    lengths = draw.choice([Lengths.fixed(512), Lengths.uniform(64, 700)])
    workload = Workload(
        batch_size=draw.choice([30, 64]),
        prompt=lengths,
        response=lengths,
        num_mini_batches=draw.choice([1, 3]),
    )
    return Setting(
        dataflow=dataflow,
        models=models,
        cluster=Cluster(groups=tuple(groups)),
        workload=workload,
        calibration=calibration,
        space=space,
        weights_from=weights_from,
    )


def without_role(dataflow: Dataflow, role: str) -> Dataflow:
    gone = {call.name for call in dataflow.calls if call.role == role}
    calls = tuple(
        replace(call, depends_on=tuple(name for name in call.depends_on if name not in gone))
        for call in dataflow.calls
        if call.role != role
    )
    return replace(dataflow, calls=calls)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_search_equals_brute_force(seed):
    check_against_brute_force(seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_search_equals_brute_force_on_more_questions(seed):
    check_against_brute_force(seed)


def check_against_brute_force(seed):
    setting = random_setting(seed)
    expected = brute_force(setting)
    result = search(setting)
    if expected == float("inf"):
        assert result.best is None
    else:
        assert result.best is not None
        assert result.best.step_s == pytest.approx(expected, rel=1e-8)
