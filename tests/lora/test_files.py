"""PEFT directories in and out, merging, and what is refused before a run starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hybridflow.context import RankContext
from hybridflow.local_pool import LocalPool
from recipes.checks import check_settings, check_train
from recipes.composing import RecipeFile, compose, to_settings
from recipes.merge import merge
from recipes.model_checks import check_model
from recipes.placing import place
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences, save_tiny_model
from tests.experts.plain import save_tiny_mixture
from tests.lora.plain import adapt, matrices_of
from tests.tiny import make_model
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.model.loading import ModelSource
from workers.engines.model.lora import attach, check_adapter, check_scores
from workers.engines.model.peft_files import PeftFiles
from workers.generation.vllm.adapter import engine_options
from workers.role_config import ActorConfig, PolicyConfig, ReferenceConfig

REGEX = r".*layers\.[01]\..*\.(q|v)_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter after a step, as a run saves it, with the log-probs of a batch beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    with LocalPool():
        engine = make_engine(model, LoraConfig(rank=4, alpha=6, rslora=True, target_modules=REGEX))
        engine.train_step(make_sequences(), loss_fn, entropy=True, temperature=TEMPERATURE)
        outputs = engine.forward(make_sequences())
        assert outputs.log_probs is not None
        torch.save(outputs.log_probs, folder / "log_probs.pt")
        engine.save_pretrained(folder / "adapter")
    return folder / "adapter"


def make_engine(model: Path, lora: LoraConfig) -> FsdpEngine:
    config = TrainConfig(
        precision=Precision.fp32, lora=lora, optimizer=OptimizerConfig(learning_rate=1e-2)
    )
    return FsdpEngine(
        model=ModelConfig(path=str(model)), config=config, head=Head.lm, context=RankContext()
    )


def log_probs(adapter: Path) -> torch.Tensor:
    return torch.load(adapter.parent / "log_probs.pt")


def scored(model: torch.nn.Module) -> torch.Tensor:
    """Log-probs of the batch's scored tokens at temperature 1, row by row."""
    batch, result = make_sequences(), []
    rows = batch.token_ids.split(batch.lengths.tolist())
    for tokens, count in zip(rows, batch.scored_lengths.tolist(), strict=True):
        first = len(tokens) - count
        with torch.no_grad():
            table = model(input_ids=tokens[None]).logits[0, first - 1 : -1].log_softmax(-1)
        result.append(table.gather(-1, tokens[first:, None]).squeeze(-1))
    return torch.cat(result)


def test_peft_reads_what_is_saved(model: Path, adapter: Path) -> None:
    """PEFT's model of our directory gives our log-probs."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, adapter)
    assert_close(scored(loaded), log_probs(adapter), rtol=0.0, atol=1e-5)


def test_what_peft_saves_is_read(model: Path, tmp_path: Path) -> None:
    """PEFT's directory, with its own choice of all linear layers, is trained on from where it is."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    made = peft.get_peft_model(base, config)
    made.save_pretrained(tmp_path / "peft")
    files = PeftFiles.read(str(tmp_path / "peft"))
    assert (files.config.rank, files.config.alpha) == (3, 5)
    assert len(files.config.target_modules) == 14
    with LocalPool():
        engine = make_engine(model, LoraConfig(adapter=str(tmp_path / "peft")))
        outputs = engine.forward(make_sequences())
    assert outputs.log_probs is not None
    assert_close(outputs.log_probs, scored(made), rtol=0.0, atol=1e-5)


def test_a_saved_adapter_is_read_back_bit_for_bit(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    with LocalPool():
        engine = make_engine(model, LoraConfig(adapter=str(adapter)))
        outputs = engine.forward(make_sequences())
        engine.save_pretrained(tmp_path / "again")
    assert outputs.log_probs is not None
    assert torch.equal(outputs.log_probs, log_probs(adapter))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (adapter / file).read_bytes()


def test_the_merged_directory_is_the_adapted_model(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Against LoRA in plain PyTorch and the trainer's log-probs."""
    merge(str(adapter), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(scored(merged), log_probs(adapter), rtol=0.0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapt(plain, matrices_of(adapter), 6 / 4**0.5)
    assert_close(scored(plain), log_probs(adapter), rtol=0.0, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    with pytest.raises(ValueError, match="which is not empty"):
        merge(str(adapter), str(tmp_path / "merged"))
    other = make_model(tmp_path / "other", layers=1)
    with pytest.raises(ValueError, match=r"layers\.1.* is no linear layer of"):
        merge(str(adapter), str(tmp_path / "wrong"), str(other))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "qkv"],
            "'qkv', which is no linear layer .* it has down_proj, gate_proj, k_proj",
        ),
        ("q_proj", "'q_proj', which is no linear layer"),
        (["lm_head"], "'lm_head', which is no linear layer"),
        ("(", "no regular expression"),
        ([], "use all-linear"),
    ],
)
def test_targets_that_match_nothing_are_refused(model: Path, targets: object, message: str) -> None:
    """Findings T3, T4, T17: with the names that exist."""
    with pytest.raises(ValueError, match=message):
        check_adapter(
            ModelConfig(path=str(model)), LoraConfig(rank=4, target_modules=targets), Head.lm
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_refused_with_the_layers_that_exist(tmp_path: Path, family: str) -> None:
    """Finding T3: an adapter on experts is never accepted and ignored. Attention's layers are
    adapted, and so is a dense layer's MLP."""
    model = ModelConfig(path=str(save_tiny_mixture(tmp_path / family, family)))
    for targets, message in (
        ("all-linear", r"experts \(.*gate_up_proj and others\) can't be adapted.*some of .*q_proj"),
        (["experts.gate_up_proj"], "'experts.gate_up_proj', which is no linear layer .*q_proj"),
        (r".*experts.*", r"which is no linear layer of the model that can be adapted.*q_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapter(model, LoraConfig(rank=4, target_modules=targets), Head.lm)
    targets = ["q_proj", "o_proj"]
    check_adapter(model, LoraConfig(rank=4, target_modules=targets), Head.lm)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=-1), "rank is -1"),
        (LoraConfig(rank=4, alpha=0), "alpha is 0"),
        (LoraConfig(alpha=8), "alpha is 8, which nothing reads without an adapter"),
        (LoraConfig(rank=8, adapter="x"), "rank and .*adapter are both set"),
    ],
)
def test_settings_that_mean_nothing_are_refused(lora: LoraConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_train("actor.train", TrainConfig(lora=lora))


def test_a_role_that_is_not_trained_has_no_new_adapter() -> None:
    config = ReferenceConfig(
        model=ModelConfig(path="x"), train=TrainConfig(lora=LoraConfig(rank=4))
    )
    with pytest.raises(
        ValueError, match=r"reference\.train\.lora\.rank is 4, but reference is not"
    ):
        check_settings("reference", config)


def test_a_recipe_that_only_generates_takes_no_adapter() -> None:
    """It would answer with the base."""
    config = ActorConfig(model=ModelConfig(path="x"), train=TrainConfig(lora=LoraConfig(rank=4)))
    with pytest.raises(ValueError, match="merge the adapter"):
        check_settings("generator", config)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [5, 6]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"kasa_config": {"beta": 1e-4}},
        {"a_setting_of_a_later_peft": 1.5},
    ],
)
def test_kinds_of_adapters_that_are_not_trained_are_refused(
    adapter: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """PiSSA and OLoRA change the base when they begin, so that PEFT 0.21 gives other log-probs with
    these files, by 0.2; adapters for the tokens after an invocation too."""
    settings = json.loads((adapter / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"whose {next(iter(change))} is"):
        PeftFiles.read(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"r": None}, {}, "r and lora_alpha must be numbers"),
        ({"r": 0}, {}, "both must be more than 0"),
        ({"r": 7}, {}, "both of rank r=7"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 8)}, "no matrix of a"),
        ({}, {"base_model.model.lm_head.weight": (8, 8)}, "has lm_head.weight, which is no matrix"),
        ({}, {"base_model.model.lm_head.lora_A.weight": (4, 8)}, "come with lm_head.lora_B"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    model: Path,
    adapter: Path,
    tmp_path: Path,
    settings: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    """A merge left embeddings and their adapters out without a word."""
    folder = changed(adapter, tmp_path / "changed", settings, tensors)
    for use in (lambda: check(model, folder), lambda: merge(str(folder), str(tmp_path / "merged"))):
        with pytest.raises(ValueError, match=message):
            use()


def test_an_adapter_of_another_model_is_refused_before_the_run(
    model: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By names and shapes, from the configuration alone; a base of another name is told of, because
    its shapes may be the same."""
    check(model, adapter)
    assert not caplog.messages
    copy = shutil.copytree(model, tmp_path / "copy")
    check(copy, adapter)
    assert "must be the same weights" in caplog.messages[0]
    narrow = save_tiny_model(tmp_path / "narrow", "llama", layers=2)
    with pytest.raises(ValueError, match=r"has shape .* and the model needs"):
        check(narrow, adapter)
    phi = save_tiny_model(tmp_path / "phi3", "phi3", layers=2)
    with pytest.raises(ValueError, match=r"adapt .*q_proj, which is no linear layer of the model"):
        check(phi, adapter)


def test_heads_go_where_they_are_needed(model: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter with a head is a critic's or a reward model's; a reward model that is not trained
    needs one."""
    head = {"base_model.model.score.weight": (1, 128)}
    scored = changed(adapter, tmp_path / "scored", {"modules_to_save": ["score"]}, head)
    check_adapter(ModelConfig(path=str(model)), LoraConfig(adapter=str(scored)), Head.value)
    check_scores(LoraConfig(adapter=str(scored)))
    with pytest.raises(ValueError, match="adapter of a critic or reward model"):
        check(model, scored)
    with pytest.raises(ValueError, match="scores would mean nothing"):
        check_scores(LoraConfig(adapter=str(adapter)))
    wide = changed(scored, tmp_path / "wide", {}, {"base_model.model.score.weight": (3, 128)})
    with pytest.raises(ValueError, match="one number a token"):
        check_adapter(ModelConfig(path=str(model)), LoraConfig(adapter=str(wide)), Head.value)


def test_an_adapter_is_no_model(model: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.path to its base and train.lora.adapter="):
        check_adapter(ModelConfig(path=str(adapter)), LoraConfig(rank=4), Head.lm)


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "fp8"])
def test_a_quantized_base_is_refused(
    model: Path, adapter: Path, tmp_path: Path, method: str
) -> None:
    """Finding T10: QLoRA's base can't be merged into. Before the run, and by the merge."""
    folder = shutil.copytree(model, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    train = TrainConfig(lora=LoraConfig(rank=4))
    policy = PolicyConfig(model=ModelConfig(path=str(folder)), train=train)
    with pytest.raises(ValueError, match=rf"policy: .*weights are quantized \({method}\)"):
        check_model("policy", policy, Head.lm, 1)
    with pytest.raises(ValueError, match="weights are quantized"):
        merge(str(adapter), str(tmp_path / "merged"), str(folder))


def test_a_tied_output_embedding_is_not_merged_into(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    """The input embedding would change with it."""
    sizes = json.loads((model / "config.json").read_text())
    assert sizes["tie_word_embeddings"]
    matrices = {"A": (4, sizes["hidden_size"]), "B": (sizes["vocab_size"], 4)}
    tensors = {}
    for matrix, shape in matrices.items():
        tensors[f"base_model.model.lm_head.lora_{matrix}.weight"] = shape
    folder = changed(adapter, tmp_path / "changed", {}, tensors)
    with pytest.raises(ValueError, match=r"lm_head .* has the weight of the input embedding"):
        merge(str(folder), str(tmp_path / "merged"))


def check(model: Path, adapter: Path) -> None:
    check_adapter(ModelConfig(path=str(model)), LoraConfig(adapter=str(adapter)), Head.lm)


def changed(
    adapter: Path, folder: Path, settings: dict[str, object], tensors: dict[str, tuple[int, ...]]
) -> Path:
    """A copy of the adapter with other settings and further tensors, of ones."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stored = load_file(folder / "adapter_model.safetensors")
    stored |= {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


def test_attaching_loads_no_weight(model: Path) -> None:
    """Finding T15: an adapter is attached before the base is divided, and copies nothing of it: the
    only new memory is the matrices', so that nothing is gathered or held whole, under ZeRO-3 too."""
    source = ModelSource(ModelConfig(path=str(model)), Head.lm, RankContext(), 0)
    before = {name: value.data_ptr() for name, value in source.model.named_parameters()}
    adapter = attach(source, LoraConfig(rank=4), Head.lm, 0)
    assert adapter.layers
    after = dict(source.model.named_parameters())
    assert {name: after[name].data_ptr() for name in before} == before
    new = after.keys() - before.keys()
    assert len(new) == 2 * len(adapter.layers)
    assert all(4 in after[name].shape for name in new)


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (20, 32), (512, 512)])
def test_an_adapter_gets_the_next_larger_slot(rank: int, slot: int) -> None:
    """Finding T11: vLLM has slots of some ranks only, and an adapter takes the next larger one."""
    assert engine_options(LoraConfig(rank=rank))["max_lora_rank"] == slot


@pytest.mark.parametrize("targets", [REGEX, "[q_proj,v_proj]", "all-linear"])
def test_targets_pass_the_command_line_as_they_are(targets: str) -> None:
    """Finding T16: a regular expression is not mangled."""
    config = compose(RecipeFile.of("grpo"), [f"actor.train.lora.target_modules={targets}"])
    value = OmegaConf.to_container(config.actor.train.lora)["target_modules"]
    assert value == (["q_proj", "v_proj"] if targets.startswith("[") else targets)


def test_the_reference_of_an_adapted_policy_is_named(model: Path, adapter: Path) -> None:
    """The reference is the policy that training began with, its adapter too."""
    settings = {
        "runtime": "local",
        "model.path": str(model),
        "data.train": "unused.jsonl",
        "reward.function": "tests.tiny:by_length",
        "actor.loss.kl_coefficient": "0.1",
        "actor.generation.engine": "hf",
        "actor.train.lora.adapter": str(adapter),
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    with pytest.raises(ValueError, match=r"set reference\.train\.lora\.adapter="):
        place(to_settings(compose(RecipeFile.of("grpo"), arguments)))
    arguments.append(f"reference.train.lora.adapter={adapter}")
    assert place(to_settings(compose(RecipeFile.of("grpo"), arguments))).roles
