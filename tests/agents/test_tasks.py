"""The two tasks of recipes/agents: what is asked, what the environment answers, what is imitated."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from recipes.agents import calculator, documents
from recipes.agents.documents import Library
from recipes.agents.model import CHAT_TEMPLATE, make_agent_tokenizer
from recipes.agents.prepare import TASKS, demonstration_row
from tests.agents.chat import conversation, saying
from workers.agents.environment import play
from workers.agents.interfaces import as_episode
from workers.agents.outcome import Outcome
from workers.agents.renderer import Renderer


def rows(make: Any, count: int = 50) -> list[dict[str, Any]]:
    random_ = random.Random(3)
    return [make(random_) for _ in range(count)]


def test_only_who_searches_for_the_name_can_know() -> None:
    """Every question is answered by its own document; the wrong word finds nothing."""
    for row in rows(documents.make_row):
        question, _, name = row["prompt"][0]["content"].rstrip("?").split()
        words = documents.search(row["documents"], name).split()
        assert row["answer"] == words[{"What": 3, "Where": 5}[question]]
        assert documents.search(row["documents"], question) == "nothing"
        model = conversation(saying([f"?{name}", row["answer"]]))
        assert asyncio.run(play(Library(), model, row)).reward == 1.0


@pytest.mark.parametrize("name", ["demonstration", "reading"])
def test_what_is_imitated(name: str) -> None:
    """The assistant's words and their end, and of a reading the answer alone."""
    tokenizer = make_agent_tokenizer(documents.FRAMES)
    renderer = Renderer(tokenizer)
    for row in rows(documents.make_row, 10):
        ids, learned = demonstration_row(renderer, row["prompt"], row[name])
        text = tokenizer.decode(
            [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
        )
        said = [words for role, words in row[name] if role == "assistant"]
        assert text == "".join(f"{words}<|end|>" for words in said)
        assert len(said) == {"demonstration": 2, "reading": 1}[name]
        shown = renderer.render(row["prompt"])
        assert tokenizer.decode(ids).startswith(shown)


@pytest.mark.parametrize("interface", TASKS["calculator"].environments)
def test_sums_through_each_interface(interface: str) -> None:
    """Each gives the same transcript."""
    if interface == "endpoint":
        pytest.importorskip("openai")
    episode = as_episode(TASKS["calculator"].environments[interface]).episode
    for row in rows(calculator.make_row, 5):
        expression = row["prompt"][0]["content"]
        assert calculator.value_of(expression) == int(row["answer"])
        call = f'<tool_call>{{"name": "calculate", "arguments": {{"expression": "{expression}"}}}}'
        words = [f"{call}</tool_call>", f"={row['answer']}"]
        model = conversation(saying(words), reply_tokens=200, template=CHAT_TEMPLATE)
        outcome = asyncio.run(episode(model, row))
        assert outcome == 1.0 or outcome == Outcome(reward=1.0)
        assert model.renderer.tokenizer.decode(model.ids) == (
            f"<|user|>{expression}<|end|><|assistant|>{words[0]}<|end|>"
            f"<|user|><tool_response>{row['answer']}</tool_response><|end|>"
            f"<|assistant|>{words[1]}<|end|>"
        )
