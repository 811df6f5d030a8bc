"""Runs of recipes.grpo on mixtures: with routes of the generation engine in this process, and with
divided experts on Ray and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow import open_session
from tests.experts.plain import save_tiny_mixture
from tests.tiny import by_length, make_model, tiny_grpo


def mixture_settings(directory: Path, **sizes: int) -> dict[str, object]:
    settings = tiny_grpo(directory)
    save_tiny_mixture(directory / "mixture", "qwen3_moe", vocab_size=128, **sizes)
    words = make_model(directory / "words", layers=1)
    for file in words.glob("tokenizer*"):
        (directory / "mixture" / file.name).write_bytes(file.read_bytes())
    return settings | {
        "model.path": directory / "mixture",
        "actor.train.router_aux_loss_coefficient": 0.01,
        "actor.consistency": "error",
    }


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_grpo_replays_routes(tmp_path: Path, replay: str) -> None:
    """Every token is replayed, in each of two small optimizer steps, and with R3 the first step finds the
    log-probs of the generation engine."""
    settings = mixture_settings(tmp_path)
    settings |= {
        "actor.router_replay": replay,
        "actor.num_epochs": 2,
        "actor.train.optimizer.learning_rate": 1e-5,
    }
    with open_session("grpo", settings, reward=by_length) as session:
        metrics = session.step()
    assert metrics["actor/router/replayed"] == 1.0
    assert metrics["actor/router/agreement"] > 0.9
    assert 0 < metrics["actor/router/aux_loss"] < 1
    assert metrics["actor/log_prob_gap_max"] < 1e-4


@pytest.mark.slow
def test_divided_experts_reach_vllm(tmp_path: Path) -> None:
    """Experts that two data ranks divide, and vLLM's weights after two syncs with changed ones: what
    it draws has the log-probs of the training engine to 1e-5, with the routes that it took (R3)."""
    settings = mixture_settings(tmp_path, head_dim=32)  # the least that vLLM's attention takes
    settings |= {
        "runtime": "ray",
        "num_devices": 2,
        "actor.train.ep": 2,
        "actor.router_replay": "R3",
        "actor.generation.engine": "vllm",
        "actor.generation.max_model_len": 64,
        "actor.generation.kv_cache_bytes": 1 << 22,
        "actor.train.optimizer.learning_rate": 1e-3,
    }
    with open_session("grpo", settings, reward=by_length) as session:
        for _ in range(3):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < 1e-5
            assert metrics["actor/router/replayed"] == 1.0
            assert metrics["actor/grad_norm"] > 0
