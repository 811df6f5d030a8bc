"""A8: what a published model brings is exported as it came, and saving is tried before the first
step; the saved weights have the model's own data type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from hybridflow.checkpoint import CheckpointStore
from recipes.python_api import open_session
from tests.tiny import make_data, make_model

LLAMA_2_CHAT = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_length": 200}
"""What meta-llama/Llama-2-7b-chat-hf and lmsys/vicuna-7b-v1.5 were published with."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint with such a generation_config.json."""
    directory = make_model(tmp_path_factory.mktemp("published") / "model")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | LLAMA_2_CHAT))
    return directory


def settings(model: Path, directory: Path) -> list[str]:
    return [
        f"model.path={model}",
        f"data.train={make_data(directory / 'data.jsonl', rows=4)}",
        f"output_dir={directory / 'out'}",
        "runtime=local",
        "data.batch_size=2",
        "algorithm.samples_per_prompt=2",
        "actor.generation.engine=hf",
        "actor.generation.sampling.max_response_tokens=3",
        "actor.generation.precision=fp32",
        "actor.train.precision=fp32",
        "actor.train.optimizer.learning_rate=1e-3",
        "reference.train.precision=fp32",
        "reward.function=tests.recipes.rewards:plain",
    ]


def test_a8_a_published_generation_config_is_exported_as_it_came(
    model: Path, tmp_path: Path
) -> None:
    """And the weights are bfloat16 again, while the checkpoint to resume from keeps float32."""
    with open_session("grpo", settings(model, tmp_path)) as session:
        session.step()
        session.checkpoint()
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    export = checkpoint / "huggingface"
    published, saved = (
        GenerationConfig.from_pretrained(directory).to_diff_dict() for directory in (model, export)
    )
    assert {name: saved.get(name) for name in LLAMA_2_CHAT} == {
        name: published.get(name) for name in LLAMA_2_CHAT
    }
    assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.6
    weights = load_file(export / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(export)
    assert loaded.dtype is torch.bfloat16


@pytest.mark.parametrize(("setting", "dtype"), [("float32", torch.float32), ("auto", None)])
def test_saved_weights_are_those_of_training_in_the_data_type_asked_for(
    model: Path, tmp_path: Path, setting: str, dtype: torch.dtype | None
) -> None:
    arguments = [*settings(model, tmp_path), f"model.dtype={setting}"]
    with open_session("grpo", arguments) as session:
        session.step()
        session.save(tmp_path / "saved")
        session.actor.save_checkpoint(str(tmp_path / "full"))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype or torch.bfloat16}
    trained = load_file(model / "model.safetensors")
    moved = [
        name for name in weights if not torch.equal(weights[name].float(), trained[name].float())
    ]
    assert moved, "a step at 1e-3 moves bfloat16 weights"


def test_a8_saving_is_tried_before_the_first_step(model: Path, tmp_path: Path) -> None:
    """A file where the checkpoints' folder should be is found at the start, and nothing is left of
    a trial that went well."""
    with open_session("grpo", settings(model, tmp_path)):
        assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    (tmp_path / "out" / "checkpoints").rmdir()
    (tmp_path / "out" / "checkpoints").write_text("in the way")
    with pytest.raises(ValueError, match=r"output_dir: no checkpoint can be written to .*choose"):
        open_session("grpo", settings(model, tmp_path))


def test_a8_a_checkpoint_that_the_disk_has_no_space_for_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store.trial() as directory:
        (directory / "part").write_text("x")
    assert list(tmp_path.iterdir()) == []
    store.check_space(1)
    with pytest.raises(ValueError, match=r"a checkpoint takes 1e\+09 GB .* are free in"):
        store.check_space(10**18)
