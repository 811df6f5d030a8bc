"""Mixtures of experts in the mapper: sizes against transformers' own classes, closed forms of what
expert parallelism divides and exchanges, and plans for the published models (SCALE.md 5.3 f)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families.family import Family
from benchmarks.families.images import WITH_IMAGES
from benchmarks.families.models import FAMILIES as MODEL_FAMILIES
from hybridflow.layout import Layout
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.simulate.footprint import stage_parameters, state_footprint
from hybridflow.mapping.simulate.passes import training_time
from hybridflow.mapping.simulate.transition import received_fraction
from hybridflow.resharding import compile, verify
from hybridflow.resharding.analytic import decoder_rules, fsdp, generation, threed
from hybridflow.resharding.grouping import fewest_bytes, vanilla
from tests.experts.plain import COMMON, FAMILIES
from tests.mapping.test_simulators import A100, WORKLOAD, machine
from workers.engines.model.loading import standard_sizes

QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        QWEN
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        QWEN
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
        },
    ),
    "deepseek-v3": ("deepseek_v3", {}),
}
"""The sizes of the published config.json files; DeepSeek-V3's are transformers' defaults."""
MIXTURE = replace(MODELS["qwen3-30b-a3b"], num_layers=8)


def spec_of(family: str, settings: dict[str, Any]) -> tuple[ModelSpec, int]:
    """The mapper's sizes, and the number of parameters of transformers' model."""
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelSpec.from_hf(config.to_dict(), name=family), total


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family: str) -> None:
    """Qwen3-MoE has a dense layer in the middle, DeepSeek-V3 latent attention, shared experts and a
    dense first layer; routers and norms are left out, which tiny models feel."""
    settings = COMMON | FAMILIES[family] | {"hidden_size": 256, "vocab_size": 2000}
    spec, total = spec_of(family, settings)
    assert spec.num_parameters == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    "family",
    [
        family
        for family in MODEL_FAMILIES
        if family not in WITH_IMAGES and family.name not in ("Mamba", "Bamba")
    ],
    ids=lambda family: family.name,
)
def test_sizes_of_every_family(family: Family) -> None:
    """Whatever a family calls its dense layers and its shared experts; gates of attention, convolutions,
    and MLPs of two matrices. Learned positions, biases and norms are left out."""
    config = family.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.config())
    total = sum(parameter.numel() for parameter in model.parameters())
    spec = ModelSpec.from_hf(standard_sizes(config), name=family.name)
    assert spec.num_parameters == pytest.approx(total, rel=0.025)


def test_convolutions_keep_no_keys_and_values() -> None:
    """LFM2-8B-A1B: 6 of 24 layers attend, with 8 heads of 64 for keys and for values."""
    kinds = ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]
    spec, total = spec_of("lfm2_moe", {"num_hidden_layers": 24, "layer_types": kinds})
    assert spec.kv_elements_per_token == 2 * 6 * 8 * 64
    assert spec.num_parameters == pytest.approx(total, rel=0.001)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_are_the_published_ones(name: str) -> None:
    spec, total = spec_of(*PUBLISHED[name])
    assert replace(spec, name=name) == MODELS[name]
    assert spec.num_parameters == pytest.approx(total, rel=0.001)


def test_latent_attention_caches_a_narrow_row() -> None:
    """512 + 64 numbers a layer and token, where 128 heads of 192 and 128 would be 40,960."""
    assert MODELS["deepseek-v3"].kv_elements_per_token == 61 * 576


def test_layers_without_experts_are_counted() -> None:
    content = {**PUBLISHED["qwen3-30b-a3b"][1], "mlp_only_layers": [0, 5], "decoder_sparse_step": 2}
    spec = ModelSpec.from_hf(content, name="sparse")
    assert spec.num_dense_layers == 25  # the even layers, and layer 5


def test_experts_are_divided_and_the_rest_is_not() -> None:
    routed = MIXTURE.num_layers * MIXTURE.routed_parameters
    dense = MIXTURE.num_parameters - routed
    divided = stage_parameters(MIXTURE, ModelLayout(t=2, d=8, e=8))
    assert divided == pytest.approx(dense / 2 + routed / 8)
    assert stage_parameters(MIXTURE, ModelLayout(t=2, d=8)) == pytest.approx(
        MIXTURE.num_parameters / 2
    )


def test_a_cut_state_is_the_same_for_every_size() -> None:
    """ZeRO-3 leaves a rank 1 / 16 of everything: experts of e ranks are cut over 16 / e."""
    space = SearchSpace()
    whole = state_footprint(MIXTURE, ModelLayout(d=16, zero=3), space, trained=True)
    for e in (2, 4, 16):
        cut = state_footprint(MIXTURE, ModelLayout(d=16, zero=3, e=e), space, trained=True)
        assert cut.total == pytest.approx(whole.total)


def test_an_exchange_sends_a_row_for_every_expert_there_and_back() -> None:
    """Per layer and direction 2 n k h (e - 1) / e numbers."""
    layout = ModelLayout(d=8, e=8, zero=1, micro_batch_tokens=8192)
    seconds = training_time(MIXTURE, layout, machine()).experts
    rows = 2 * WORKLOAD.num_tokens / 8 * MIXTURE.experts_per_token * 7 / 8
    numbers = 2 * MIXTURE.num_layers * rows * MIXTURE.hidden_size
    assert seconds == pytest.approx(2 * numbers / A100.intra_bandwidth)
    alone = training_time(MIXTURE, replace(layout, e=1), machine())
    assert alone.experts == 0
    assert alone.gradients > training_time(MIXTURE, layout, machine()).gradients


def test_sizes_divide_experts_and_ranks() -> None:
    space = SearchSpace(splits_experts=False)
    assert space.expert_layouts(MIXTURE, 1, 24) == [1, 2, 4, 8]
    assert space.expert_layouts(MIXTURE, 4, 16) == [4, 8, 16]
    assert space.expert_layouts(MODELS["llama-7b"], 4, 16) == [1]
    assert replace(space, splits_experts=True).expert_layouts(MIXTURE, 4, 4) == [1, 4]


@pytest.mark.parametrize(("name", "ep"), [("fsdp", 2), ("fsdp", 8), ("threed", 4)])
@pytest.mark.parametrize("tg", [1, 2, 4])
def test_plans_move_the_bytes_of_the_bound(name: str, ep: int, tg: int) -> None:
    """Expert boxes of training against parts of every expert in generation; the mapper predicts
    what the fullest rank receives."""
    rules = decoder_rules(
        num_layers=2,
        hidden=64,
        intermediate=32,
        num_heads=4,
        num_kv_heads=4,
        vocab=256,
        norms=False,
        experts=16,
    )
    rules = [rule for rule in rules if rule.experts]
    if name == "fsdp":
        source, training = fsdp(rules, 8, ep=ep), ModelLayout(d=8, e=ep, zero=2)
    else:
        layout = Layout.of(tp=2, dp=4)
        source, training = threed(rules, layout, ep=ep), ModelLayout(t=2, d=4, e=ep)
    target = generation(rules, vanilla(8, tp=tg))
    grouping = fewest_bytes(source, target, tp=tg)
    certificate = verify(compile(source, generation(rules, grouping), bucket_bytes=1 << 20))
    assert certificate.received_max == certificate.bound_max
    assert certificate.received_total == certificate.bound_total
    predicted = received_fraction(
        training,
        GenerationLayout(tg=tg, replicas=8 // tg),
        cut=name == "fsdp",
        routed=1.0,
    )
    assert certificate.received_max / certificate.model_bytes == pytest.approx(predicted)


def test_generation_has_stages_only_where_the_weights_fill_a_node() -> None:
    """Half of a node's 640 GB holds 61 GB, not 470 GB, and a fifth of 1342 GB; at most twice as many
    stages, where they divide the 96 devices."""
    group = Cluster.parse("16x8xH100-80GB").groups[0]
    space = SearchSpace()
    for name, deepest in (("qwen3-30b-a3b", 1), ("qwen3-235b-a22b", 2), ("deepseek-v3", 8)):
        layouts = space.generation_layouts(MODELS[name], group, 96)
        assert max(pg for pg, _, _ in layouts) == deepest
