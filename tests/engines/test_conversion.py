"""Parameters as files store them, against what transformers itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.families.models import FAMILIES, make_model
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
