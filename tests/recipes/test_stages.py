"""The stages before reinforcement learning, in this process: they learn, and their numbers are
those of plain transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hybridflow.metrics import read_jsonl
from recipes.main import to_settings
from recipes.run import run
from tests.tiny import EOS, make_model

TEMPLATE = (
    "{% for m in messages %}{{ 8 if m.role == 'user' else 9 }} {{ m.content }} 1 {% endfor %}{% if "
    "add_generation_prompt %}9{% endif %}"
)
RISING, FALLING = "3 4 5 6 7 8 9", "9 8 7 6 5 4 3"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("stages") / "model")


@pytest.fixture
def train(composed: Callable[..., DictConfig], model: Path, tmp_path: Path) -> Callable[..., Any]:
    """train("sft", rows, "policy.train...=..."): runs the recipe; (outcome, rows of
    metrics.jsonl, Hugging Face directory)."""

    def stage(recipe: str, rows: list[dict[str, Any]], *arguments: str) -> Any:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        role = "policy" if recipe in ("sft", "dpo") else "reward_model"
        common = [
            "runtime=local",
            f"model.path={model}",
            f"data.train={data}",
            f"data.validation={data}",
            f"data.batch_size={len(rows)}",
            f"output_dir={tmp_path}/out",
            "metrics.console=false",
            f"{role}.train.precision=fp32",
            "reference.train.precision=fp32",
            f"{role}.train.micro_batch_tokens=40",
            f"{role}.train.optimizer.learning_rate=3e-3",
            "loop.num_steps=6",
        ]
        outcome = run(to_settings(composed(recipe, [*common, *arguments])))
        store = tmp_path / "out" / "checkpoints"
        directory = store / (store / "latest").read_text().strip() / "huggingface"
        return outcome, read_jsonl(tmp_path / "out" / "metrics.jsonl"), directory

    return stage


def demonstrations() -> list[dict[str, Any]]:
    """Responses of 1 to 6 numbers."""
    drawn = np.random.default_rng(0)
    return [
        {"prompt": RISING[: 2 * drawn.integers(1, 7) - 1], "response": FALLING[: 2 * length - 1]}
        for length in (1, 2, 4, 6, 6, 3)
    ]


def pairs() -> list[dict[str, Any]]:
    """Falling numbers are preferred (and safe), rising ones are not; all of different lengths."""
    return [
        {
            "prompt": RISING[: 2 * length - 1],
            "chosen": FALLING[: 2 * length - 1],
            "rejected": RISING[: 2 * (8 - length) - 1],
            "chosen_safe": True,
            "rejected_safe": False,
        }
        for length in range(2, 7)
    ]


def tokens(directory: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(directory)(text).input_ids
    return found


@torch.no_grad()
def log_prob(directory: Path, prompt: str, response: str) -> Tensor:
    """Sum over the response's tokens, by transformers alone."""
    lm = AutoModelForCausalLM.from_pretrained(directory)
    asked, answered = tokens(directory, prompt), [*tokens(directory, response), EOS]
    logits = lm(torch.tensor([asked + answered])).logits[0, len(asked) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answered)[:, None]).sum()


@torch.no_grad()
def labels_loss(directory: Path, rows: list[dict[str, Any]]) -> float:
    """transformers' own loss on one padded batch, prompts and padding ignored."""
    lm = AutoModelForCausalLM.from_pretrained(directory)
    encoded = [
        (tokens(directory, row["prompt"]), [*tokens(directory, row["response"]), EOS])
        for row in rows
    ]
    width = max(len(asked) + len(answered) for asked, answered in encoded)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    for row, (asked, answered) in enumerate(encoded):
        ids[row, : len(asked) + len(answered)] = torch.tensor(asked + answered)
        labels[row, len(asked) : len(asked) + len(answered)] = torch.tensor(answered)
    return float(lm(input_ids=ids, labels=labels).loss)


def test_sft_learns_and_its_loss_is_that_of_transformers(
    train: Callable[..., Any], model: Path
) -> None:
    rows = demonstrations()
    outcome, metrics, saved = train("sft", rows, "algorithm.num_mini_batches=1")
    first = labels_loss(model, rows)
    assert metrics[0]["loss"] == pytest.approx(first, rel=1e-5), "validation before the first step"
    assert metrics[1]["policy/nll"] == pytest.approx(first, rel=1e-5), (
        "the first step, in micro-batches of 40 tokens"
    )
    assert (
        outcome.validation_after["loss"] == pytest.approx(labels_loss(saved, rows), rel=1e-5)
        and outcome.reward_after is None
    )
    assert outcome.validation_after["loss"] < 0.5 * first
    assert metrics[1]["rows"] == 6 and outcome.tokens == 6 * sum(
        len((row["prompt"] + " " + row["response"]).split()) + 1 for row in rows
    )


def test_conversations_learn_the_assistants_turns_only(
    train: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "3 4"), ("assistant", "4 3"), ("user", "5"))
    ]
    conversation = [*turns, {"role": "assistant", "content": "5 5"}]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    settings = [
        "data.messages_column=messages",
        f"data.chat_template={tmp_path}/chat.jinja",
        "loop.num_steps=1",
    ]
    _, metrics, _ = train("sft", [{"messages": conversation}], *settings)
    ids = torch.tensor([[8, 3, 4, 1, 9, 4, 3, 1, 8, 5, 1, 9, 5, 5, 1]])
    labels = torch.where(torch.tensor([[0] * 5 + [1] * 3 + [0] * 4 + [1] * 3]).bool(), ids, -100)
    with torch.no_grad():
        expected = float(
            AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, labels=labels).loss
        )
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5) and metrics[1][
        "policy/nll"
    ] == pytest.approx(expected, rel=1e-5)


def test_dpo_is_its_closed_form(train: Callable[..., Any], model: Path) -> None:
    rows = pairs()
    outcome, metrics, saved = train(
        "dpo", rows, "algorithm.loss.beta=0.3", "algorithm.num_mini_batches=2"
    )
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), (
        "policy and reference are one"
    )
    margins = []
    for row in rows:
        gain = {
            kind: log_prob(saved, row["prompt"], row[kind])
            - log_prob(model, row["prompt"], row[kind])
            for kind in ("chosen", "rejected")
        }
        margins.append(0.3 * (gain["chosen"] - gain["rejected"]))
    margin = torch.stack(margins)
    assert outcome.validation_after["margin"] == pytest.approx(float(margin.mean()), rel=1e-4)
    assert outcome.validation_after["loss"] == pytest.approx(
        float(-F.logsigmoid(margin).mean()), rel=1e-4
    )
    assert outcome.validation_after["accuracy"] == 1.0 and outcome.validation_after["loss"] < 0.3


@pytest.mark.parametrize(("recipe", "sign"), [("reward_model", 1), ("cost_model", -1)])
def test_reward_and_cost_models_are_what_transformers_loads(
    train: Callable[..., Any], recipe: str, sign: int
) -> None:
    rows = pairs()
    outcome, _, saved = train(recipe, rows)
    scorer = AutoModelForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        scores = [
            [
                float(
                    scorer(
                        torch.tensor(
                            [[*tokens(saved, row["prompt"]), *tokens(saved, row[kind]), EOS]]
                        )
                    ).logits
                )
                for kind in row
                if kind in KINDS
            ]
            for row in rows
        ]
    margin = sign * torch.tensor([chosen - rejected for chosen, rejected in scores]).double()
    assert outcome.validation_after["margin"] == pytest.approx(float(margin.mean()), rel=1e-4)
    assert outcome.validation_after["loss"] == pytest.approx(
        float(-F.logsigmoid(margin).mean()), rel=1e-4
    )
    assert (
        outcome.validation_after["accuracy"] == 1.0 and outcome.validation_before["accuracy"] < 1.0
    )
    if recipe == "cost_model":
        assert outcome.validation_after["sign_accuracy"] == 1.0


KINDS = ("chosen", "rejected")
