"""Chat templates that write the day's date, as Llama 3.2's: all of a run has one day."""

from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from recipes.python_api import dry_run, run
from tests.agents.chat import QWEN, chat_model, chat_settings
from tests.tiny import by_length, tiny_grpo
from workers.agents.model import Model
from workers.config import ModelConfig
from workers.judge import Questions
from workers.role_config import JudgeRoleConfig
from workers.text import dated

TEMPLATE = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %m %Y') %}{%- endif %}"
    "{{ date_string }} {% for message in messages %}{{ message['content'] }} {% endfor %}"
)


def settings(tmp_path: Path) -> dict[str, object]:
    values = tiny_grpo(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "answer": "0"} for i in range(3, 11)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return values | {
        "data.train": tmp_path / "chats.jsonl",
        "output_dir": tmp_path / "run",
        "loop.num_steps": 1,
        "loop.checkpoint_every": 1,
        "metrics.console": False,
    }


def test_a_run_that_goes_on_tomorrow_has_todays_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = settings(tmp_path)
    run("grpo", values | {"data.date": "2026-01-02"}, reward=by_length)
    with caplog.at_level(logging.INFO):
        assert run("grpo", values | {"loop.num_steps": 2}, reward=by_length).num_steps == 2
    assert "data.date is 2026-01-02 for all of the run" in caplog.text
    with pytest.raises(ValueError, match="fingerprint"):
        run("grpo", values | {"loop.num_steps": 3, "data.date": "2026-01-03"}, reward=by_length)


def test_the_day_of_a_new_run_is_today(tmp_path: Path) -> None:
    values = settings(tmp_path)
    before = date.today()
    run("grpo", values, reward=by_length)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["date"]
    assert date.fromisoformat(written) in (before, date.today())
    exported = tmp_path / "run/checkpoints/step-00000001/huggingface"
    assert AutoTokenizer.from_pretrained(exported).chat_template == TEMPLATE
    with pytest.raises(ValueError, match=r"data.date is 'today'; use a day as"):
        dry_run("grpo", values | {"data.date": "today"}, reward=by_length)


def test_todays_text_is_that_of_transformers(tmp_path: Path) -> None:
    settings(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "5"}]
    for _ in range(2):  # unless midnight comes between
        today = date.today().isoformat()
        theirs = tokenizer.apply_chat_template(messages, tokenize=False)
        mine = tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=dated(TEMPLATE, today)
        )
        if today == date.today().isoformat():
            break
    assert mine == theirs
    assert dated({"default": TEMPLATE}, None) == {"default": TEMPLATE}
    assert "'02 01 2026'" in dated({"default": TEMPLATE}, "2026-01-02")["default"]


def test_prompts_of_the_validation_that_are_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = tiny_grpo(tmp_path)
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines()
    other = json.dumps({"prompt": "9 9 9 9 9 9 9 9 9", "answer": "0"})
    (tmp_path / "held.jsonl").write_text("\n".join([other, rows[3], rows[5]]) + "\n")
    dry_run("grpo", values | {"data.validation": tmp_path / "held.jsonl"}, reward=by_length)
    assert "data.validation: 2 of 3 prompts are in data.train too (the first: " in caplog.text
    assert "held.jsonl, line 2)" in caplog.text
    caplog.clear()
    (tmp_path / "held.jsonl").write_text(other + "\n")
    dry_run("grpo", values | {"data.validation": tmp_path / "held.jsonl"}, reward=by_length)
    assert "are in data.train too" not in caplog.text


def test_episodes_have_the_day_of_the_run(tmp_path: Path) -> None:
    values = chat_settings(tmp_path) | {
        "data.date": "2026-01-02",
        "loop.num_steps": 1,
        "output_dir": tmp_path / "run",
    }
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B') }}." + template.read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    shown = []

    async def one_turn(model: Model, task: dict[str, Any]) -> float:
        reply = await model.reply(task["prompt"])
        shown.append(tokenizer.decode(model.ids))
        return float(len(reply.text) % 5)

    run("grpo", values, environment=one_turn)
    assert len(shown) == 8
    assert all(text.startswith("02 January.<|user|>\nCount to ") for text in shown), shown[0]


def test_a_judge_has_the_day_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where its template alone writes the date, too."""
    values = chat_settings(tmp_path)
    judge = chat_model(tmp_path / "judge", "{{ strftime_now('%d %B') }}." + QWEN)
    written = {
        "judge.model.path": str(judge),
        "judge.template": "{prompt} {response}",
        "judge.yes": "yes",
        "judge.no": "no",
        "output_dir": tmp_path / "run",
    }
    with caplog.at_level(logging.INFO):
        dry_run("online_dpo", values | written | {"algorithm.samples_per_prompt": 2})
    assert f"data.date is {date.today()} for all of the run" in caplog.text
    config = JudgeRoleConfig(
        model=ModelConfig(path=str(judge)),
        policy=ModelConfig(path=str(tmp_path / "model")),
        date="2026-01-02",
        template="{prompt} {response}",
    )
    questions = Questions(config)
    text = questions.tokenizer.decode(questions.ask({"prompt": "3", "response": "4"}))
    assert text == "02 January.<|user|>\n3 4<|end|>\n<|assistant|>\n"
