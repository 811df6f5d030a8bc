"""Critics and reward models of families for which transformers has only a language model, and
families whose code does not pack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmarks.families.family import Family
from benchmarks.families.models import FAMILIES, make_model
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import check_packing, load_pretrained


@pytest.mark.parametrize("name", ["Granite", "Cohere 2", "Apertus", "Ernie 4.5", "Llama 4, text"])
def test_a_critic_is_the_decoder_with_a_new_head(name: str, tmp_path: Path) -> None:
    family = next(entry for entry in FAMILIES if entry.name == name)
    path = make_model(family, tmp_path / "model")
    critic = load_pretrained(ModelConfig(path=str(path)), Head.value).eval()
    decoder = AutoModel.from_pretrained(path).eval()
    ids = torch.tensor([[5, 900, 17, 4, 256]])
    with torch.no_grad():
        hidden = decoder(ids).last_hidden_state
        values = critic.score(critic.base_model(ids).last_hidden_state)
    torch.testing.assert_close(values, hidden @ critic.score.weight.T)
    critic.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.score.weight, critic.score.weight)


CHUNKS_OR_CONVOLUTIONS = ("llama-4-text", "lfm2-moe")
"""Their rows in docs/models.md are the refusal."""


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.key)
def test_families_that_cannot_be_packed_are_refused(entry: Family, tmp_path: Path) -> None:
    """Nemotron's layers take the segments of a packed row and hand them to nothing: rows saw each
    other without a word."""
    path = make_model(entry, tmp_path)
    for head in (Head.lm, Head.value):
        if entry.packing and entry.key not in CHUNKS_OR_CONVOLUTIONS:
            check_packing(ModelConfig(path=str(path)), head)
            continue
        with pytest.raises(ValueError, match=r"train.packing is true, but .*set packing=false"):
            check_packing(ModelConfig(path=str(path)), head)
