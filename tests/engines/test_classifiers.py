"""Critics and reward models of families for which transformers has only a language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmarks.families.models import FAMILIES, make_model
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import load_pretrained


@pytest.mark.parametrize("name", ["Granite", "Cohere 2", "Apertus", "Ernie 4.5"])
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
