"""Context parallelism in the mapper: closed forms of what it divides and exchanges."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridflow.mapping.answer.explain import context_gain
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.space import LEAST_PART, SearchSpace
from hybridflow.mapping.simulate.footprint import state_footprint
from hybridflow.mapping.simulate.moments import training_moments
from hybridflow.mapping.simulate.passes import exchanged_per_token, training_time
from recipes.plan import find_answer, to_config
from tests.mapping.test_simulators import A100, LLAMA, WORKLOAD, machine


def test_a_plan_has_as_many_devices_as_its_sizes_say() -> None:
    layout = ModelLayout(p=2, t=4, d=2, c=8)
    assert layout.num_devices == 128 and layout.shards == 16
    assert str(layout) == "2-4-2 cp8"


def test_an_exchange_moves_every_head_but_the_ranks_own() -> None:
    """Per layer and direction (n / c) (2 h + 2 h_kv) 2 bytes (c - 1) / c; compute is that of one
    device over c."""
    alone = training_time(LLAMA, ModelLayout(micro_batch_tokens=8192), machine())
    shared = training_time(LLAMA, ModelLayout(c=8, micro_batch_tokens=8192), machine())
    numbers = (2 * LLAMA.query_dim + 2 * LLAMA.kv_dim) * 7 / 8
    sent = 2 * LLAMA.num_layers * WORKLOAD.num_tokens / 8 * numbers * 2
    assert shared.context == pytest.approx(sent / A100.intra_bandwidth)
    assert shared.compute == pytest.approx(alone.compute / 8, rel=0.01)


def test_keys_are_gathered_where_the_heads_do_not_divide() -> None:
    """6 query heads, 2 key-value heads: 2 n h_kv (c - 1) / c numbers for a rank, in its n / c
    tokens; with c = 6 heads are exchanged, and each key head is sent three times."""
    model = replace(LLAMA, num_heads=6, num_kv_heads=2)
    gathered = exchanged_per_token(model, ModelLayout(c=4))
    assert gathered == pytest.approx(2 * model.kv_dim * 3)
    exchanged = exchanged_per_token(model, ModelLayout(c=6))
    assert exchanged == pytest.approx((2 * model.query_dim + 6 * model.kv_dim) * 5 / 6)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_divided_and_states_are_cut_as_over_data_ranks(recompute: bool) -> None:
    space = SearchSpace()
    activations = []
    for c in (1, 8):
        layout = ModelLayout(c=c, recompute=recompute, micro_batch_tokens=8192)
        moments = training_moments(LLAMA, layout, space, WORKLOAD, 1)
        activations.append(moments["first"].activations)
    assert activations[0] == pytest.approx(8 * activations[1])
    context = state_footprint(LLAMA, ModelLayout(c=4, d=2, zero=3), space, trained=True)
    data = state_footprint(LLAMA, ModelLayout(d=8, zero=3), space, trained=True)
    assert context == data


def test_sizes_are_tried_where_rows_are_long() -> None:
    space = SearchSpace()
    assert space.contexts(2 * LEAST_PART - 1, 16) == [1]
    assert space.contexts(4 * LEAST_PART, 16) == [1, 2, 4]
    assert space.contexts(100 * LEAST_PART, 12) == [1, 2, 4]


@pytest.mark.slow
def test_a_72b_model_with_long_responses_gets_a_plan_with_its_reason() -> None:
    """The issue's question: 128 H100, responses of up to 32,768 tokens."""
    arguments = "algorithm=grpo model=qwen2.5-72b models.reward=function cluster=16x8xH100-80GB"
    sizes = "batch_size=64 samples_per_prompt=16 num_mini_batches=4 response=lognormal:8000:32768"
    answer = find_answer(to_config([*arguments.split(), *sizes.split(), "engine=fsdp"]))
    assert answer.result is not None
    gain = context_gain(answer.setting, answer.result)
    assert gain.startswith("context parallelism (actor cp") and "without it takes" in gain
