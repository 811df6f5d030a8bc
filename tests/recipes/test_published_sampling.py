"""Sampling settings in a model's generation_config.json: a line says that a run draws without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import GenerationConfig

from recipes.python_api import dry_run
from tests.tiny import by_length, tiny_grpo


def test_sampling_settings_that_are_not_taken_over_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny_grpo(tmp_path)
    with caplog.at_level(logging.INFO):
        dry_run("grpo", settings, reward=by_length)
    assert "generation_config.json of" not in caplog.text
    published = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.05, eos_token_id=1
    )
    published.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        dry_run("grpo", settings, reward=by_length)
    assert (
        "has temperature=0.7, top_k=20, repetition_penalty=1.05, which are not taken over"
        in caplog.text
    )
