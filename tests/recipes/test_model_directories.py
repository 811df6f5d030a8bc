"""Directories of models as people bring them: each trains with transformers' numbers, or is refused in
one line before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from recipes.python_api import dry_run, run
from tests.tiny import VOCAB, by_length, make_model, tiny_grpo
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import load_pretrained

WIDTH = 128
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, an untied one, and settings."""
    root = tmp_path_factory.mktemp("models")
    tiny_grpo(root)
    make_model(root / "untied", layers=1, tied=False)
    return root


def settings(root: Path, **roles: Path) -> dict[str, object]:
    values = tiny_grpo_settings(root)
    for role, path in roles.items():
        values["model.path" if role == "policy" else f"{role}.model.path"] = path
    return values


def tiny_grpo_settings(root: Path) -> dict[str, object]:
    return {
        "runtime": "local",
        "model.path": root / "model",
        "data.train": root / "prompts.jsonl",
        "data.batch_size": 4,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "metrics.tensorboard": False,
        "metrics.console": False,
        "loop.num_steps": 1,
    }


def changed(
    source: Path,
    directory: Path,
    weights: Callable[[Weights], Weights] | None = None,
    **config: Any,
) -> Path:
    """A copy of a model with other weights, or other values in its config.json (None: without)."""
    shutil.copytree(source, directory)
    if weights is not None:
        kept = weights(load_file(source / "model.safetensors"))
        kept = {name: tensor.contiguous().clone() for name, tensor in kept.items()}
        save_file(kept, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    values = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in values.items() if value != ""}))
    return directory


def classifier(source: Path, directory: Path, labels: int, **config: Any) -> Path:
    """A sequence classifier of transformers' own."""
    shutil.copytree(source, directory)
    torch.manual_seed(labels)
    hf_config = AutoConfig.from_pretrained(source, num_labels=labels, **config)
    model = AutoModelForSequenceClassification.from_config(hf_config)
    model.save_pretrained(directory)
    return directory


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if name not in key}


def plus(**entries: tuple[int, ...]) -> Callable[[Weights], Weights]:
    made = {name.replace("__", "."): torch.ones(shape) for name, shape in entries.items()}
    return lambda weights: weights | made


REFUSED = [
    pytest.param(
        "model", plus(model__layers__7__gate__weight=(3,)), {}, "unexpected .*layers.7", id="extra"
    ),
    pytest.param("model", without("q_proj.bias"), {}, "missing .*q_proj.bias", id="missing"),
    pytest.param(
        "model",
        plus(model__layers__0__self_attn__q_proj__weight=(64, WIDTH)),
        {},
        r"q_proj.weight is \[64, 128\] in its files and \[128, 128\] by its config.json; use the",
        id="shape",
    ),
    pytest.param(
        "model", None, {"vocab_size": VOCAB + 2}, r"embed_tokens.weight is \[128, 128\]", id="rows"
    ),
    pytest.param("untied", without("lm_head"), {}, r"missing \['lm_head.weight'\]", id="headless"),
    pytest.param(
        "model",
        plus(lm_head__weight=(VOCAB, WIDTH)),
        {},
        "tie_word_embeddings=true, and its files hold an output embedding that differs",
        id="tied-apart",
    ),
    pytest.param(
        "model", plus(v_head__summary__weight=(1, WIDTH)), {}, "unexpected .*v_head", id="value"
    ),
    pytest.param(
        "model", None, {"dtype": "bf16"}, "can't read its config.json; AttributeError", id="dtype"
    ),
    pytest.param(
        "model", None, {"num_hidden_layers": 3}, "can't read its config.json; .*layer_types", id="n"
    ),
    pytest.param(
        "model",
        None,
        {"rope_parameters": {"rope_type": "longest", "factor": 2.0}},
        "transformers can't build the model of its config.json; KeyError: 'longest'",
        id="rope",
    ),
    pytest.param("model", None, {"model_type": "own"}, "can't read its config.json", id="type"),
    pytest.param(
        "model",
        None,
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        r"its weights are quantized \(awq\)",
        id="quantized",
    ),
]


@pytest.mark.parametrize(("source", "weights", "config", "message"), REFUSED)
def test_a_policy_that_does_not_fit_is_one_line(
    root: Path,
    tmp_path: Path,
    source: str,
    weights: Callable[[Weights], Weights] | None,
    config: dict[str, Any],
    message: str,
) -> None:
    model = changed(root / source, tmp_path / "m", weights, **config)
    with pytest.raises(ValueError, match=message) as error:
        dry_run("grpo", settings(root, policy=model), reward=by_length)
    assert "\n" not in str(error.value) and "model.path is" in str(error.value)


def test_files_in_place_of_a_directory_are_named(root: Path, tmp_path: Path) -> None:
    """Also a pickle that would run a program: it is not run."""
    model = shutil.copytree(root / "model", tmp_path / "m")
    (model / "model.safetensors").rename(model / "m.Q4_1.gguf")
    report = dry_run("grpo", settings(root, policy=model), reward=by_length)
    assert "a run would end: actor: model.path is" in report and "but m.Q4_1.gguf" in report
    with pytest.raises(ValueError, match=r"no weights in it.*\(but m.Q4_1.gguf\)"):
        run("grpo", settings(root, policy=model) | {"output_dir": tmp_path / "o"}, reward=by_length)
    with pytest.raises(ValueError, match=r"a file; give the directory .* gguf_file=name"):
        dry_run("grpo", settings(root, policy=model / "m.Q4_1.gguf"), reward=by_length)
    torch.save({"x": Path("a")}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no file of weights alone"):
        dry_run("grpo", settings(root, policy=model), reward=by_length)


ACCEPTED = {
    "one file twice": lambda weights: weights | {"lm_head.weight": weights[EMBEDDING]},
    "the head's name alone": lambda weights: (
        without(EMBEDDING)(weights) | {"lm_head.weight": weights[EMBEDDING]}
    ),
    "a base model's names": lambda weights: {
        name.removeprefix("model."): tensor for name, tensor in weights.items()
    },
    "mixed data types": lambda weights: {
        name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()
    },
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_ways_to_store_a_model_are_the_same_model(
    root: Path, tmp_path: Path, name: str
) -> None:
    model = changed(root / "model", tmp_path / "m", ACCEPTED[name])
    dry_run("grpo", settings(root, policy=model), reward=by_length)
    ids = torch.arange(3, 20)[None]
    loaded = load_pretrained(ModelConfig(path=str(model)), Head.lm)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)


REWARDS = [
    pytest.param(2, None, r"head gives 2 numbers \(score.weight is \[2, 128\]\)", id="two"),
    pytest.param(5, None, "head gives 5 numbers", id="five"),
    pytest.param(1, "v_head.summary", "stored as v_head.summary.weight, which", id="TRL"),
    pytest.param(1, "classifier", "stored as classifier.weight, which transformers", id="other"),
    pytest.param(1, "lm_head", "a language model without a score head", id="language"),
]


@pytest.mark.parametrize(("labels", "head", "message"), REWARDS)
@pytest.mark.parametrize("role", ["reward", "critic"])
def test_a_head_that_would_be_drawn_anew_is_one_line(
    root: Path, tmp_path: Path, role: str, labels: int, head: str | None, message: str
) -> None:
    model = classifier(root / "model", tmp_path / "m", labels)
    if head is not None:
        renamed = {
            name.replace("score", head): tensor
            for name, tensor in load_file(model / "model.safetensors").items()
        }
        save_file(renamed, model / "model.safetensors", {"format": "pt"})
    recipe, reward = ("grpo", None) if role == "reward" else ("ppo", by_length)
    values = settings(root, **{role: model})
    if role == "critic" and head == "lm_head":  # whose head may be new
        dry_run(recipe, values, reward=reward)
        return
    with pytest.raises(ValueError, match=f"{role}: model.path is .*{message}"):
        dry_run(recipe, values, reward=reward)


def test_a_decoder_alone_has_no_score_head(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(root / "model", tmp_path / "m")
    AutoModel.from_pretrained(root / "model").save_pretrained(model)
    with pytest.raises(ValueError, match=r"reward: .*without a score head"):
        dry_run("grpo", settings(root, reward=model))


@pytest.mark.parametrize("config", [{"id2label": {0: "GOOD"}}, {"problem_type": "regression"}])
def test_scores_of_one_label_are_those_of_transformers(
    root: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Whatever the label's name is, and with an output embedding beside the head."""
    model = classifier(root / "model", tmp_path / "m", 1, **config)
    stored = load_file(model / "model.safetensors")
    save_file(stored | plus(lm_head__weight=(VOCAB, WIDTH))(stored), model / "model.safetensors")
    dry_run("grpo", settings(root, reward=model))
    ids = torch.arange(3, 20)[None]
    mine = load_pretrained(ModelConfig(path=str(model)), Head.score)
    theirs = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    assert torch.equal(mine(ids).logits, theirs(ids).logits)
    assert mine.config.id2label == config.get("id2label", {0: "LABEL_0"})


def test_chat_templates_and_endings_that_can_not_be_read_are_told(
    root: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(root / "model", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(model)
    row = {"prompt": [{"role": "user", "content": "5"}], "answer": "0"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    values = settings(root, policy=model)
    chat: dict[str, object] = {"data.train": tmp_path / "chat.jsonl", "data.batch_size": 1}
    with pytest.raises(ValueError, match="templates are rag, tool_use, none of them default; set"):
        dry_run("grpo", values | chat, reward=by_length)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its generation_config.json can't be read, which names"):
        dry_run("grpo", values, reward=by_length)


CONFIGURATION = """
from transformers import Qwen2Config

class OwnConfig(Qwen2Config):
    model_type = "own_kind"
"""
MODELING = """
from transformers import Qwen2ForCausalLM

from .configuration_own import OwnConfig
from .shared_own import SCALE

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **settings):
        outputs = super().forward(*args, **settings)
        assert SCALE == 1.0
        return outputs
"""


def test_what_is_saved_of_a_model_with_code_of_its_own_loads(root: Path, tmp_path: Path) -> None:
    """transformers loads it: all files of the code are there, and the numbers are of the kind of those that
    were read, which no config.json named."""
    names = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    own = changed(
        root / "model",
        tmp_path / "own",
        lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()},
        model_type="own_kind",
        architectures=["OwnModel"],
        auto_map=names,
        dtype="",
    )
    (own / "configuration_own.py").write_text(CONFIGURATION)
    (own / "modeling_own.py").write_text(MODELING)
    (own / "shared_own.py").write_text("SCALE = 1.0\n")
    more = {
        "model.trust_remote_code": True,
        "output_dir": tmp_path / "out",
        "actor.train.optimizer.learning_rate": 1e-30,
    }
    run("grpo", settings(root, policy=own) | more, reward=by_length)
    (saved,) = (tmp_path / "out").glob("checkpoints/step-*/huggingface")
    assert json.loads((saved / "config.json").read_text())["auto_map"] == names
    ids = torch.arange(12).view(1, 12)
    logits = []
    for place in (own, saved):
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, dtype="auto")
        assert model.dtype == torch.bfloat16 and type(model).__name__ == "OwnModel"
        with torch.no_grad():
            logits.append(model(ids).logits)
    before, after = (load_file(place / "model.safetensors") for place in (own, saved))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-20)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
