"""Parameters as files store them, against what transformers itself writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.families.models import FAMILIES, make_model
from benchmarks.families.tokens import make_tokenizer
from recipes.python_api import open_session
from tests.tiny import VOCAB, by_length, tiny_grpo
from workers.engines.model.conversion import as_stored, converts

EXPERTS = ("Qwen 3 MoE", "Mixtral", "OLMoE", "GPT-OSS")
CONVERTED = ("Qwen 3 MoE", "Mixtral", "OLMoE")


@pytest.mark.parametrize("name", ["Qwen 3", *EXPERTS])
def test_names_and_values_are_those_of_transformers_files(name: str, tmp_path: Path) -> None:
    """SCALE 5.0: an export under the names of memory is read by no other system (T31)."""
    family = next(family for family in FAMILIES if family.name == name)
    files = load_file(make_model(family, tmp_path) / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    stored = as_stored(model, parameters)
    assert converts(model) is (name in CONVERTED)
    assert set(stored) == set(files)
    assert all(torch.equal(stored[key], files[key]) for key in files)
    # A model without weights, as engines have it, knows the same names.
    with torch.device("meta"):
        unloaded = AutoModelForCausalLM.from_config(model.config)
    assert set(as_stored(unloaded, dict(unloaded.named_parameters()))) == set(files)


def test_a_run_with_experts_saves_what_transformers_and_its_files_know(tmp_path: Path) -> None:
    """SCALE 5.0: every entry of the published file, buffers that no step changes bit for bit, and the
    generation engine holds the trainer's numbers after the sync (the first step's gap)."""
    family = next(family for family in FAMILIES if family.name == "DeepSeek-V3")
    family = replace(family, settings=family.settings | {"num_hidden_layers": 2})
    model = make_model(family, tmp_path / "experts", vocabulary=VOCAB)
    make_tokenizer(tmp_path / "tokenizer", VOCAB)
    settings = tiny_grpo(tmp_path) | {
        "model.path": model,
        "model.tokenizer": tmp_path / "tokenizer",
        "output_dir": tmp_path / "out",
        "reference.train.precision": "fp32",
        "actor.generation.max_model_len": 64,
    }
    published = load_file(model / "model.safetensors")
    with open_session("grpo", settings, reward=by_length) as session:
        for _ in range(2):
            gap = session.step()["actor/log_prob_gap_max"]
            assert gap < 1e-5
        session.actor.save_pretrained(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(published)
    moved = {key for key in saved if not torch.equal(saved[key], published[key])}
    assert not any("e_score_correction_bias" in key for key in moved)
    assert any("experts.0.down_proj" in key for key in moved)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
