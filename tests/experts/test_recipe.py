"""A run of recipes.grpo with routes of the generation engine, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow import open_session
from tests.experts.plain import save_tiny_mixture
from tests.tiny import by_length, make_model, tiny_grpo


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_grpo_replays_routes(tmp_path: Path, replay: str) -> None:
    """Every token is replayed, in each of two small optimizer steps, and with R3 the first step finds the
    log-probs of the generation engine."""
    settings = tiny_grpo(tmp_path)
    save_tiny_mixture(tmp_path / "mixture", "qwen3_moe", vocab_size=128)
    words = make_model(tmp_path / "words", layers=1)
    for file in words.glob("tokenizer*"):
        (tmp_path / "mixture" / file.name).write_bytes(file.read_bytes())
    settings |= {
        "model.path": tmp_path / "mixture",
        "actor.router_replay": replay,
        "actor.num_epochs": 2,
        "actor.train.optimizer.learning_rate": 1e-5,
        "actor.train.router_aux_loss_coefficient": 0.01,
        "actor.consistency": "error",
    }
    with open_session("grpo", settings, reward=by_length) as session:
        metrics = session.step()
    assert metrics["actor/router/replayed"] == 1.0
    assert metrics["actor/router/agreement"] > 0.9
    assert 0 < metrics["actor/router/aux_loss"] < 1
    assert metrics["actor/log_prob_gap_max"] < 1e-4
