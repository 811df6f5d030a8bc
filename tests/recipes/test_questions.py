"""recipes.evaluate and recipes.generate: checkpoints as people name them, and what can only go wrong at
the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer, CodeGenConfig, CodeGenForCausalLM

from recipes.python_api import dry_run, evaluate, generate, run
from tests.tiny import EOS, PAD, VOCAB, make_data, tiny_grpo

KEPT = ("runtime", "model.path", "actor.generation.engine", "actor.generation.precision")


def by_tokens(*, response: str, **columns: object) -> float:
    """A reward that differs between responses of one length."""
    return sum(map(int, response.split())) / 100


def question(settings: dict[str, object], tmp_path: Path) -> dict[str, object]:
    return {name: settings[name] for name in KEPT} | {
        "actor.generation.sampling.max_response_tokens": 5,
        "data.validation": make_data(tmp_path / "held.jsonl", rows=6, seed=5),
        "data.batch_size": 4,
        "metrics.console": False,
        "output_dir": tmp_path / "answers",
    }


def test_a_runs_model_is_found_and_scores_as_its_validation_did(tmp_path: Path) -> None:
    settings = tiny_grpo(tmp_path) | {"output_dir": tmp_path / "run", "metrics.console": False}
    asked = question(settings, tmp_path)
    settings |= {"data.validation": tmp_path / "held.jsonl", "loop.num_steps": 2}
    outcome = run("grpo", settings, reward=by_tokens)
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints", step):
        with pytest.raises(
            ValueError, match=rf"there is one in {step}/huggingface; set model.path"
        ):
            dry_run("evaluate", asked | {"model.path": place}, reward=by_tokens)
    numbers = evaluate(asked | {"model.path": step / "huggingface"}, reward=by_tokens)
    before = evaluate(asked, reward=by_tokens)
    assert numbers["reward/mean"] == pytest.approx(outcome.reward_after, abs=1e-6)
    assert before["reward/mean"] == pytest.approx(outcome.reward_before, abs=1e-6)
    assert numbers["reward/mean"] != before["reward/mean"]


def test_what_fails_only_at_the_end_is_told_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = question(tiny_grpo(tmp_path), tmp_path)
    same = asked | {"algorithm.samples_per_prompt": 4}
    with pytest.raises(ValueError, match="all samples would be the same"):
        dry_run("evaluate", same, reward=by_tokens)
    long = json.dumps({"prompt": "3 " * 300, "answer": "0"})
    (tmp_path / "long.jsonl").write_text(long + "\n")
    with pytest.raises(ValueError, match=r"^data.validation: its longest prompt has 300 tokens"):
        dry_run("evaluate", asked | {"data.validation": tmp_path / "long.jsonl"}, reward=by_tokens)
    with pytest.raises(
        ValueError, match=r"^data.train is .*, and recipes.evaluate answers data.val"
    ):
        dry_run("evaluate", asked | {"data.train": tmp_path / "long.jsonl"}, reward=by_tokens)
    taken = tmp_path / "answers" / "samples.parquet"
    taken.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"samples.parquet is no file and would be one"):
        dry_run("evaluate", asked, reward=by_tokens)
    taken.rmdir()
    evaluate(asked, reward=by_tokens)
    with caplog.at_level(logging.WARNING):
        evaluate(asked, reward=by_tokens)
    assert "evaluation.json" in caplog.text and "replaced once all prompts are" in caplog.text
    asked["data.train"] = asked.pop("data.validation")
    assert generate(asked).name == "responses.parquet"


def test_a_model_that_is_only_asked_needs_no_training_settings(tmp_path: Path) -> None:
    """CodeGen can't be packed, which nothing does that only answers."""
    settings = tiny_grpo(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(settings["model.path"])
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    model = CodeGenForCausalLM(
        CodeGenConfig(
            vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=PAD, **shape
        )
    ).eval()
    model.save_pretrained(tmp_path / "codegen")
    tokenizer.save_pretrained(tmp_path / "codegen")
    asked = question(settings, tmp_path) | {
        "model.path": tmp_path / "codegen",
        "actor.generation.sampling.greedy": True,
        "actor.generation.sampling.ignore_eos": True,
        "actor.train.packing": True,
        "actor.model.attention": "eager",
    }
    asked |= {"data.train": asked.pop("data.validation")}
    with pytest.raises(ValueError, match=r"^actor: generation.sampling.max_response_tokens is 64"):
        dry_run("generate", asked | {"actor.generation.sampling.max_response_tokens": 64})
    for row in parquet.read_table(generate(asked)).to_pylist():
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert row["response"] == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
