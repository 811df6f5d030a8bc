"""The simulators against closed forms, naive simulations and the paper's table."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hybridflow.dataflow import CallKind
from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.search.options import pass_time
from hybridflow.mapping.simulate.decoding import decode_profile
from hybridflow.mapping.simulate.fabric import Fabric
from hybridflow.mapping.simulate.footprint import (
    generation_footprint,
    held_for_generation,
    resident_footprint,
    state_footprint,
)
from hybridflow.mapping.simulate.generation import DecodeStep, generation_time
from hybridflow.mapping.simulate.moments import training_moments
from hybridflow.mapping.simulate.passes import Machine, inference_time, training_time
from hybridflow.mapping.simulate.transition import received_fraction, transition_time

A100 = DEVICE_KINDS["A100-80GB"]
LLAMA = MODELS["llama-7b"]
WORKLOAD = Workload(
    batch_size=1024, prompt=Lengths.fixed(1024), response=Lengths.fixed(1024), num_mini_batches=8
)
FREE = Calibration(
    layer_overhead_s=0,
    micro_batch_overhead_s=0,
    decode_layer_overhead_s=0,
    decode_step_overhead_s=0,
    decode_row_overhead_s=0,
    call_overhead_s=0,
    intra_latency_s=0,
    inter_latency_s=0,
    link_efficiency=1,
    matmul_efficiency=1,
    bandwidth_efficiency=1,
    elementwise_efficiency=1,
    update_efficiency=1,
    decode_matmul_efficiency=1,
)
FAST_MEMORY = replace(A100, memory_bandwidth=1e30)


def machine(kind=A100, calibration=FREE, **workload) -> Machine:
    return Machine(kind, calibration, SearchSpace(), replace(WORKLOAD, **workload))


def test_training_is_six_flops_per_parameter_and_token():
    """Kaplan et al. 2020: C = 6 N D, plus attention (12 layers hidden context / 2 per token)."""
    layout = ModelLayout(micro_batch_tokens=8192)
    parts = training_time(LLAMA, layout, machine(FAST_MEMORY))
    matrices = LLAMA.num_layers * LLAMA.layer_parameters
    head = LLAMA.head_parameters / 2  # only the responses' tokens are scored
    attention = 3 * 4 * LLAMA.num_layers * LLAMA.query_dim * 1024
    expected = WORKLOAD.num_tokens * (6 * (matrices + head) + attention) / A100.flops
    assert parts.total == pytest.approx(expected, rel=1e-9)


def test_recomputation_adds_a_third():
    plain = training_time(LLAMA, ModelLayout(micro_batch_tokens=8192), machine(FAST_MEMORY))
    again = training_time(
        LLAMA, ModelLayout(micro_batch_tokens=8192, recompute=True), machine(FAST_MEMORY)
    )
    assert again.compute / plain.compute == pytest.approx(4 / 3, rel=0.01)


def test_bubble_is_p_minus_one_over_m():
    """Narayanan et al. 2021: bubble / ideal = (p - 1) / m; 16 rows a replica make 16
    micro-batches of one row."""
    layout = ModelLayout(p=4, t=1, d=8, micro_batch_tokens=2048)
    parts = training_time(LLAMA, layout, machine())
    working = parts.compute + parts.pipeline + parts.tensor
    assert parts.bubble / working == pytest.approx(3 / 16)


def test_collectives_follow_alpha_beta():
    fabric = Fabric(A100, FREE, 16)
    assert fabric.all_gather(8e9, 8) == pytest.approx(7 / 8 * 8e9 / 300e9)
    assert fabric.all_reduce(8e9, 8) == pytest.approx(2 * fabric.all_gather(8e9, 8))
    assert fabric.all_gather(1e9, 1) == 0
    # 8 groups of two ranks, one on each node, share the node's link: each sends half of its bytes
    # over it.
    assert fabric.all_gather(1e9, 2, stride=8) == pytest.approx(8 * 0.5e9 / 25e9)
    # one group of all 16: half of the bytes cross once.
    assert fabric.all_gather(1e9, 16) == pytest.approx(0.5e9 / 25e9)


def test_data_parallel_gradients_are_reduced_once_per_update():
    parts = training_time(LLAMA, ModelLayout(d=2, t=8, micro_batch_tokens=8192), machine())
    shard = 4 * LLAMA.num_parameters / 8
    micro_batches = 1024 / 8 / 2 * 2048 / 8192
    adding = 3 * shard / A100.memory_bandwidth  # the sum is read and written, the new gradient read
    assert parts.gradients == pytest.approx(
        8 * (2 * (8 * shard / 2) / 25e9 + (micro_batches - 1) * adding)
    )


def test_what_an_update_changed_is_gathered_by_the_next_pass(paper_setting):
    """FSDP's shards: the critic's values gather the parameters, its update finds them gathered;
    the actor has no pass before its own."""
    setting, layout = paper_setting("llama-7b", 8), ModelLayout(d=8, zero=2)
    space = replace(setting.space, cut_between_steps=True, whole_up_to_bytes=1e12)
    cut = replace(setting, space=space)
    gathering = Fabric(A100, setting.calibration, 8).all_gather(
        2 * setting.model("critic").num_parameters, 8
    )
    for role, moved in (("critic", gathering), ("actor", 0.0)):
        calls = [call for call in setting.calls(role) if call.kind is not CallKind.generation]
        before, after = (
            [pass_time(each, role, 0, call, layout).total for call in calls]
            for each in (setting, cut)
        )
        assert sum(after) == pytest.approx(sum(before))
        assert after[0] - before[0] == pytest.approx(moved)


def test_states_take_eighteen_bytes_and_zero_cuts_them():
    """Rajbhandari et al. 2020, figure 1, with float32 gradients."""
    space = SearchSpace()
    whole = state_footprint(LLAMA, ModelLayout(d=4), space, trained=True)
    assert whole.total == pytest.approx(18 * LLAMA.num_parameters)
    for zero, per_parameter in ((1, 2 + 4 + 3), (2, 2 + 1 + 3), (3, 18 / 4)):
        state = state_footprint(LLAMA, ModelLayout(d=4, zero=zero), space, trained=True)
        assert state.total == pytest.approx(per_parameter * LLAMA.num_parameters)


def test_shards_of_a_large_model_are_reduced_layer_by_layer():
    """Finding 12 of the GPU audit: FSDP2 adds a small model's gradient up whole on every rank; of a
    large one a rank has its shard, a layer's in bf16 and in float32, and the head's in bf16 until
    the embedding's is there."""
    layout, count = ModelLayout(d=8, zero=2, micro_batch_tokens=2048), LLAMA.num_parameters
    sizes = []
    for whole_up_to_bytes in (1e12, 1.0):
        space = SearchSpace(cut_between_steps=True, whole_up_to_bytes=whole_up_to_bytes)
        states = resident_footprint(LLAMA, layout, space, trained=True)
        assert states.optimizer == pytest.approx(count)  # 8 bytes over 8 ranks
        step = states + training_moments(LLAMA, layout, space, WORKLOAD, 4)["first"]
        assert step.parameters == pytest.approx(4 * count / 8 + 2 * count)  # gathered in bf16
        sizes.append((step.gradients, step.buffers))
    (whole, _), (shard, buffers) = sizes
    assert whole == pytest.approx(4 * count)
    assert shard == pytest.approx(4 * count / 8)
    inner = 2 * 2 * 2048 * LLAMA.intermediate_size  # of an MLP's products and their gradients
    reduced = 6 * LLAMA.layer_parameters + 2 * LLAMA.head_parameters
    assert buffers == pytest.approx(reduced + inner)


def test_activations_follow_korthikanti():
    """A layer stores 6 h + 2 q + 2 kv + 4 f numbers a token, and in half precision its norms' input
    and normalised input in float32; 1F1B keeps min(p, m) micro-batches."""
    layout = ModelLayout(p=4, t=2, d=1, micro_batch_tokens=2048)
    space = SearchSpace()
    few, many = (
        training_moments(LLAMA, layout, space, WORKLOAD, number)["first"] for number in (1, 64)
    )
    assert many.activations == pytest.approx(4 * few.activations)
    per_layer = 2 * (6 * 4096 + 4 * 4096 + 4 * 11008) + 4 * 2 * 4096
    assert few.activations == pytest.approx(8 * 2048 * per_layer / 2)


@pytest.mark.parametrize("seed", range(20))
def test_decode_profile_equals_a_step_by_step_simulation(seed):
    draw = random.Random(seed)
    lengths = Lengths(tuple(sorted(draw.randint(1, 40) for _ in range(draw.randint(1, 12)))))
    rows, most = draw.randint(1, 60), draw.randint(1, 20)
    waiting, running, steps, tokens, context = lengths.sample(rows), [], 0, 0, 0.0
    while waiting or running:
        while waiting and len(running) < most:
            running.append([0, waiting.pop(0)])
        steps += 1
        tokens += len(running)
        context += sum(done for done, _ in running)
        running = [[done + 1, length] for done, length in running if done + 1 < length]
    profile = decode_profile(lengths, rows, most)
    assert sum(part.steps for part in profile) == pytest.approx(steps)
    assert sum(part.steps * part.running for part in profile) == pytest.approx(tokens)
    generated = sum(part.steps * part.running * part.generated for part in profile)
    # Positions count as half done during a step.
    assert generated == pytest.approx(context + tokens / 2)


def test_decode_reads_weights_and_cache():
    layout = GenerationLayout(pg=1, tg=1, replicas=1, max_running=32)
    workload = machine(kind=replace(A100, flops=1e30))
    seconds = DecodeStep(LLAMA, layout, workload).seconds(32, 1500)
    weights = 2 * (LLAMA.num_layers * LLAMA.layer_parameters + LLAMA.head_parameters)
    cache = 2 * LLAMA.kv_elements_per_token * 32 * 1500
    assert seconds == pytest.approx((weights + cache) / A100.memory_bandwidth, rel=0.02)


def test_fewer_running_sequences_take_more_waves():
    seconds = [
        generation_time(
            LLAMA, GenerationLayout(tg=2, replicas=8, max_running=running), machine()
        ).total
        for running in (128, 64, 32)
    ]
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.3 * seconds[0]


def test_long_tail_costs_more_than_its_mean():
    layout = GenerationLayout(tg=1, replicas=16, max_running=64)
    tail = Lengths.lognormal(512, 4096)
    spread = generation_time(LLAMA, layout, machine(response=tail)).total
    even = generation_time(LLAMA, layout, machine(response=Lengths.fixed(round(tail.mean)))).total
    assert spread > 1.3 * even


@pytest.mark.parametrize(
    ("train", "generate", "fraction"),
    [
        ((1, 4, 2), (1, 2, 4), 1 / 4),
        ((8, 8, 1), (1, 8, 8), 7 / 64),
        ((2, 4, 1), (1, 2, 4), (8 - 2) / (2 * 8)),
        ((1, 8, 2), (1, 8, 2), 0),
        ((1, 2, 8), (1, 4, 4), 0),
    ],
)
def test_transition_bytes_are_the_papers(train, generate, fraction):
    """(tp - tg pg) / (tg pg tp) M; nothing where the generation shard is part of the training
    shard."""
    training = ModelLayout(p=train[0], t=train[1], d=train[2])
    generation = GenerationLayout(pg=generate[0], tg=generate[1], replicas=generate[2])
    assert received_fraction(training, generation) == pytest.approx(fraction)
    seconds = transition_time(LLAMA, training, generation, machine())
    assert (seconds > 0) == (fraction > 0)


def test_generation_keeps_no_redundant_copy():
    """docs/paper.md section 3: peak M/(tg pg), of which the training shard is part; an engine
    with its own weights holds both."""
    space, training = SearchSpace(), ModelLayout(t=4, d=2)
    layout = GenerationLayout(tg=2, replicas=4, max_running=1)
    size = 2 * LLAMA.num_parameters
    shared = generation_footprint(
        LLAMA, layout, held_for_generation(LLAMA, training, space), space, WORKLOAD
    )
    own_space = replace(space, shared_generation_weights=False)
    own = generation_footprint(
        LLAMA, layout, held_for_generation(LLAMA, training, own_space), own_space, WORKLOAD
    )
    assert shared.generation_weights == pytest.approx(size / 2 - size / 4)
    assert own.generation_weights == pytest.approx(size / 2)


def test_inference_speeds_up_with_devices():
    layouts = [ModelLayout(t=1, d=devices, micro_batch_tokens=8192) for devices in (1, 2, 4, 8)]
    seconds = [inference_time(LLAMA, layout, machine(), trained=False).total for layout in layouts]
    assert [seconds[0] / value for value in seconds] == pytest.approx([1, 2, 4, 8], rel=0.01)


def test_lengths_and_cluster_are_parsed_or_refused():
    assert Lengths.parse("uniform:10:20").mean == pytest.approx(15, abs=0.5)
    assert Lengths.parse("lognormal:600:100000").mean == pytest.approx(600, rel=0.05)
    assert Lengths.observed([5, 1, 3]).quantiles == (1, 3, 5)
    with pytest.raises(ValueError, match="uniform:LOW:HIGH"):
        Lengths.parse("gauss:1")
    mixed = Cluster.parse("2x8xA100-80GB+4xH100-80GB")
    assert mixed.num_devices == 20
    assert mixed.groups[0].pool_sizes() == (1, 2, 3, 4, 5, 6, 7, 8, 16)
    assert Cluster.parse("32xA100-80GB") == Cluster.parse("4x8xA100-80GB")
    with pytest.raises(ValueError, match="A100-80GB"):
        Cluster.parse("8xB999")


def test_shards_between_steps_reach_every_generation_rank():
    """FSDP2 keeps 1/d of the parameters on a rank whatever is gathered during a step, so that a
    rank lacks the other (d - 1)/d."""
    training, generation = ModelLayout(d=4, zero=2), GenerationLayout(replicas=4)
    assert received_fraction(training, generation) == 0
    assert received_fraction(training, generation, cut=True) == pytest.approx(3 / 4)
    assert received_fraction(training, generation, cut=True) == received_fraction(
        replace(training, zero=3), generation
    )
