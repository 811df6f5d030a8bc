"""A2, A5 and A6: sizes of any family are read by transformers' standard names; generation.tp is held
against vLLM's own rules, and lengths and cache come from the data, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, PretrainedConfig

from benchmarks.families.family import Family
from benchmarks.families.models import FAMILIES, make_model
from benchmarks.families.tokens import make_tokenizer
from hybridflow.mapping.question.cluster import Cluster
from recipes.mapping_settings import setting_of, space_of
from recipes.preparation import dry_run_report, prepare
from recipes.python_settings import make_settings
from workers.config import Precision
from workers.engines.model.loading import standard_sizes
from workers.generation.cache import MAX_CACHE_BYTES, cache_bytes, cache_bytes_of_rows
from workers.generation.config import GenerationConfig
from workers.generation.hf import HfEngine
from workers.generation.vllm.engine import VllmEngine
from workers.generation.vllm.limits import (
    CPU_HEAD_SIZES,
    check_fits,
    check_head_size,
    check_latent,
    check_linear,
    why_not,
)


def family(name: str) -> Family:
    return next(entry for entry in FAMILIES if entry.name == name)


def config_of(name: str, **changes: object) -> PretrainedConfig:
    entry = family(name)
    settings = entry.settings | {"vocab_size": entry.vocabulary} | changes
    return AutoConfig.for_model(entry.model_type, **settings)


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.key)
def test_a2_sizes_have_standard_names_in_every_family(entry: Family) -> None:
    sizes = standard_sizes(entry.config())
    assert sizes["hidden_size"] == 192
    assert sizes["num_hidden_layers"] == 5
    if entry.model_type != "mamba":
        assert sizes["num_attention_heads"] == 6
    assert cache_bytes(sizes, GenerationConfig(max_model_len=64)) > 0


@pytest.mark.parametrize(
    ("name", "engine"),
    [("GPT-2", "vllm"), ("OPT", "vllm"), ("Bloom", "hf"), ("MPT", "hf"), ("Falcon", "hf")],
)
def test_a2_a_dry_run_takes_families_with_names_of_their_own(
    name: str, engine: str, tmp_path: Path
) -> None:
    arguments = run(tmp_path, family(name), [f"actor.generation.engine={engine}"])
    if not family(name).packing:
        arguments += [f"{role}.train.packing=false" for role in ("actor", "reference")]
    prepared = prepare(make_settings("grpo", arguments))
    assert "actor" in dry_run_report(prepared)


def test_a2_attention_that_cannot_be_packed_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    arguments = run(tmp_path, family("Bloom"), [])
    with pytest.raises(
        ValueError, match=r"actor: train.packing is true, .* bloom .* packing=false"
    ):
        prepare(make_settings("grpo", arguments))


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            r"6 key-value heads .*\[1, 2, 3, 6, 12\]",
        ),
        (
            {"num_key_value_heads": 6, "intermediate_size": 320},
            3,
            r"intermediate_size 320; use one of \[1, 2\]",
        ),
        ({"num_key_value_heads": 6}, 3, r"vocabulary, padded to 1024; use one of \[1, 2\]"),
        ({}, 4, r"6 attention heads; use one of \[1, 2\]"),
    ],
)
def test_a5_generation_tp_follows_the_rules_of_vllm(
    changes: dict[str, int], tp: int, message: str
) -> None:
    config = config_of("Qwen 2", **{"head_dim": 32, "intermediate_size": 384} | changes)
    if changes.get("num_attention_heads") == 12:
        config.vocab_size, config.intermediate_size = 960, 384  # divisible by 3 and 6
    with pytest.raises(ValueError, match=f"generation.tp is {tp}, which does not fit .*{message}"):
        check_fits(config, GenerationConfig(tp=tp))


def test_a5_key_value_heads_may_be_replicated() -> None:
    sizes = standard_sizes(
        config_of("Qwen 2", num_attention_heads=8, num_key_value_heads=2, intermediate_size=384)
    )
    assert [tp for tp in range(1, 9) if not why_not(sizes, tp)] == [1, 2, 4, 8]
    falcon = standard_sizes(config_of("Falcon", multi_query=True, new_decoder_architecture=False))
    assert not why_not(falcon, 2), "one key-value head, on both ranks"


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Qwen 3 MoE", {"moe_intermediate_size": 42}, "moe_intermediate_size 42"),
        (
            "Qwen 2 MoE",
            {"shared_expert_intermediate_size": 54},
            "shared_expert_intermediate_size 54",
        ),
        (
            "Granite MoE, shared expert",
            {"shared_intermediate_size": 50},
            "shared_intermediate_size 50",
        ),
        ("Mixtral", {"intermediate_size": 46}, "intermediate_size 46"),
    ],
)
def test_experts_are_divided_too(name: str, changes: dict[str, int], problem: str) -> None:
    """The width of every expert, and of those that every token passes."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    fitting = standard_sizes(config_of(name, **heads))
    assert not why_not(fitting, 4)
    assert why_not(standard_sizes(config_of(name, **heads, **changes)), 4) == problem


def test_heads_that_vllm_does_not_have_on_cpus() -> None:
    """Heads of 16 numbers, of which the error came out of the first step; the list is vLLM's."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert CPUAttentionBackend.get_supported_head_sizes() == list(CPU_HEAD_SIZES)
    odd = standard_sizes(config_of("Qwen 2", num_attention_heads=12, num_key_value_heads=2))
    with pytest.raises(ValueError, match="CPU build has no attention for heads of 16 numbers"):
        check_head_size(odd, "cpu")
    check_head_size(odd, "cuda")
    for entry in FAMILIES:
        if not entry.settings.get("kv_lora_rank"):
            check_head_size(standard_sizes(entry.config()), "cpu")


def test_a5_a_dry_run_refuses_it(tmp_path: Path) -> None:
    """On three devices, where vLLM raised an AssertionError."""
    arguments = run(tmp_path, family("Qwen 2"), ["runtime=ray", "num_devices=3"])
    arguments.append("actor.generation.tp=3")
    with pytest.raises(ValueError, match=r"actor: generation.tp is 3, .* 2 key-value heads"):
        prepare(make_settings("grpo", arguments))


@pytest.mark.parametrize(
    ("name", "train", "generation"),
    [("Qwen 2", (), (1, 2)), ("OPT", (1,), (1, 2))],
)
def test_a5_placement_auto_tries_only_sizes_that_a_family_is_split_into(
    tmp_path: Path, name: str, train: tuple[int, ...], generation: tuple[int, ...]
) -> None:
    """OPT has no plan for tensor parallelism in training, but vLLM has; 3 does not divide the MLP and
    the vocabulary as vLLM wants it."""
    entry = family(name)
    arguments = run(tmp_path, entry, [])
    if not entry.packing:
        arguments += [f"{role}.train.packing=false" for role in ("actor", "reference")]
    inputs = prepare(make_settings("grpo", arguments)).mapper_inputs
    assert inputs is not None
    space = space_of(inputs)
    assert space.tensor_sizes == train
    assert space.generation_tensor_sizes == generation
    group = Cluster.parse("1x8xA100-80GB").groups[0]
    layouts = space.model_layouts(setting_of(inputs).model("actor"), group, 2)
    assert {tensor for _, tensor, _ in layouts} == ({1} if train else {1, 2})


def test_a6_lengths_and_cache_come_from_the_data(tmp_path: Path) -> None:
    """Limit 131072, longest prompt 41 tokens: the cache is for 41 + 30, not for the limit."""
    arguments = run(tmp_path, family("Qwen 2"), [], max_position_embeddings=131072)
    prepared = prepare(make_settings("grpo", [*arguments, *LENGTHS]))
    generation = prepared.config.actor.generation
    assert generation.max_model_len == 41 + 30
    blocks = 4 * 2 * -(-(41 + 30) // 32) + 1 + 1  # of 32 tokens, for 4 prompts x 2 samples
    assert generation.kv_cache_bytes == 5 * blocks * 32 * 2 * 2 * 32 * 4
    asked = [*arguments, *LENGTHS, "actor.generation.max_model_len=100"]
    assert prepare(make_settings("grpo", asked)).config.actor.generation.max_model_len == 100


def test_a6_a_cache_that_holds_no_row_is_refused_with_our_names(tmp_path: Path) -> None:
    arguments = run(tmp_path, family("Qwen 2"), ["actor.generation.kv_cache_bytes=1000"])
    with pytest.raises(
        ValueError, match=r"actor.generation.kv_cache_bytes is 1000, .* raise it"
    ) as caught:
        prepare(make_settings("grpo", arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "releases"),
    [
        ([], False),
        (["actor.generation.kv_cache_bytes=300000000"], True),
        (["actor.generation.kv_cache_bytes=300000000", "actor.generation.engine=hf"], False),
        (
            [
                "actor.generation.kv_cache_bytes=300000000",
                "actor.generation.release_during_training=false",
            ],
            False,
        ),
        (["actor.generation.release_during_training=true"], True),
    ],
)
def test_a9_a_cpu_releases_a_large_generation_engine_by_itself(
    tmp_path: Path, settings: list[str], releases: bool
) -> None:
    arguments = run(tmp_path, family("Qwen 2"), settings)
    generation = prepare(make_settings("grpo", arguments)).config.actor.generation
    assert generation.release_during_training is releases


def test_a6_the_cache_of_qwen_25_05b_for_its_whole_context() -> None:
    """The 384 MiB in bfloat16 that vLLM asks for, and a block more."""
    sizes = {
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_size": 896,
    }
    config = GenerationConfig(max_model_len=32768, precision=Precision.bf16)
    whole = cache_bytes_of_rows(sizes, config, 1)
    assert 384 * 2**20 < whole < 386 * 2**20
    assert cache_bytes(sizes, config) == whole
    assert whole < MAX_CACHE_BYTES


def test_a6_layers_with_windows_have_blocks_of_their_own() -> None:
    """Three layers with windows and two without are counted as two kinds of three."""
    config = GenerationConfig(max_model_len=64, precision=Precision.fp32)
    mixed = standard_sizes(config_of("Ministral"))
    token_bytes = 2 * 2 * 32 * 4
    assert cache_bytes_of_rows(mixed, config, 1) == 6 * token_bytes * 32 * (2 + 1 + 2)


def test_longrope_rows_on_both_sides_of_its_change_are_refused_for_vllm() -> None:
    config = config_of("Phi-3, longrope")
    check_fits(config, GenerationConfig(max_model_len=32))
    with pytest.raises(ValueError, match=r"max_model_len is 49, .* longrope changes at 32 tokens"):
        check_fits(config, GenerationConfig(max_model_len=49))


def test_families_that_vllm_cannot_run_or_take_weights_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'vllm', which has no model of mpt .*engine to hf"):
        VllmEngine.check_model(config_of("MPT"), GenerationConfig())
    with pytest.raises(ValueError, match=r"whose bloom can't be built .*engine to hf"):
        VllmEngine.check_sync(config_of("Bloom"))
    VllmEngine.check_model(config_of("Bloom"), GenerationConfig())


@pytest.mark.parametrize("kind", ["minimax", "recurrent_gemma", "rwkv", "xlstm"])
def test_states_that_no_cache_of_engine_hf_holds(kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"a cache that {kind} does not take; .*engine to another"
    ):
        HfEngine.check_model(AutoConfig.for_model(kind), GenerationConfig())
    HfEngine.check_model(config_of("Mamba"), GenerationConfig())


def test_linear_attention_that_vllm_has_in_bfloat16_alone_on_cpus() -> None:
    config = AutoConfig.for_model("qwen3_5_text")
    with pytest.raises(ValueError, match=r"\(qwen3_5_text\) in bfloat16 alone; .*engine to hf, or"):
        check_linear(standard_sizes(config), Precision.fp32, "cpu")
    check_linear(standard_sizes(config), Precision.bf16, "cpu")
    check_linear(standard_sizes(config), Precision.fp32, "cuda")
    check_linear(standard_sizes(config_of("Llama")), Precision.fp32, "cpu")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_an_engine_that_would_refuse_too_is_not_advised(tmp_path: Path, engine: str) -> None:
    """Each of them would send to the other."""
    rwkv = Family(
        name="RWKV", model_type="rwkv", settings={"hidden_size": 32, "num_hidden_layers": 2}
    )
    arguments = run(tmp_path, rwkv, [f"actor.generation.engine={engine}"])
    arguments += ["actor.train.packing=false", "actor.loss.kl_coefficient=0"]
    message = (
        f"^actor: generation.engine is '{engine}'.*; nor does another engine: generation.engine is "
        "'.*; use a model of another family$"
    )
    with pytest.raises(ValueError, match=message):
        prepare(make_settings("grpo", arguments))


def test_windows_in_some_layers_of_qwen_2_are_refused_for_vllm() -> None:
    with pytest.raises(ValueError, match=r"qwen2 has no windows in only some .*engine to hf"):
        check_fits(config_of("Qwen 2, windows"), GenerationConfig())


LENGTHS = ["actor.generation.sampling.max_response_tokens=30"]


def run(directory: Path, entry: Family, more: list[str], **changes: object) -> list[str]:
    model = make_model(entry, directory / "model")
    if changes:
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))
    make_tokenizer(directory / "tokenizer")
    rows = []
    for number, length in enumerate((3, 9, 24, 41)):
        prompt = " ".join(str(5 + number) for _ in range(length))
        rows.append(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
    (directory / "data.jsonl").write_text("".join(rows))
    arguments = [
        f"model.path={model}",
        f"model.tokenizer={directory / 'tokenizer'}",
        f"data.train={directory / 'data.jsonl'}",
        "data.batch_size=4",
        "algorithm.samples_per_prompt=2",
        "actor.generation.sampling.max_response_tokens=8",
        "actor.generation.precision=fp32",
        "actor.train.precision=fp32",
        "reward.function=tests.recipes.rewards:plain",
        "runtime=local",
        f"output_dir={directory / 'out'}",
    ]
    if any(setting.startswith("runtime=") for setting in more):
        arguments.remove("runtime=local")
    return [*arguments, *more]


def test_gpus_compute_latent_attention_in_half_precision_only() -> None:
    """Every latent backend of vLLM's is float16 or bfloat16: tests/rehearsal/test_vllm_decisions.py."""
    check_latent({"model_type": "deepseek_v2"}, Precision.bf16, "cuda")
    with pytest.raises(ValueError, match=r"precision is fp32.*set generation\.precision=bf16"):
        check_latent({"model_type": "deepseek_v2"}, Precision.fp32, "cuda")
