"""Typed methods as tools: schemas, calls read out of replies, mistakes that are told (trap 4)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hybridflow import dry_run, open_session
from tests.agents.chat import chat_model, chat_settings, conversation, saying
from workers.agents.interfaces import as_episode
from workers.agents.model import Model
from workers.agents.outcome import Outcome
from workers.agents.tool_calls import ToolCall, read_calls
from workers.agents.tools import schemas_of, tool_names, toolbox, use

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


class Arithmetic:
    """Numbers, and a reward for naming their sum."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.closed = False

    def reset(self, task: dict[str, Any]) -> None:
        self.task = task

    def add(self, a: int, b: int = 1) -> int:
        """Adds two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.last = a + b
        return self.last

    async def divide(self, a: float, b: float) -> float:
        """Divides.

        Args:
            a: The dividend.
            b: The divisor.
        """
        return a / b

    def reward(self, answer: str) -> float:
        return float(answer == str(self.last))

    def close(self) -> None:
        self.closed = True

    def _hidden(self) -> None:
        raise AssertionError


def play(*replies: str, reply_tokens: int = 200) -> tuple[Outcome, Model, Arithmetic]:
    model = conversation(saying(replies), reply_tokens=reply_tokens, context_tokens=10_000)
    tools = Arithmetic()
    outcome = asyncio.run(use(toolbox(tools), model, {"prompt": "How much is 2 + 3?"}))
    assert tools.closed
    return outcome, model, tools


def told(model: Model) -> list[str]:
    return [message["content"] for message in model.messages if message["role"] == "tool"]


def test_schemas_come_from_types_and_docstrings() -> None:
    add, divide = schemas_of(Arithmetic)
    assert add["function"]["name"] == "add"
    assert add["function"]["description"] == "Adds two numbers."
    parameters = add["function"]["parameters"]
    assert parameters["properties"]["a"] == {
        "type": "integer",
        "description": "The first number.",
    }
    assert parameters["required"] == ["a"]
    assert divide["function"]["parameters"]["properties"]["b"]["type"] == "number"

    class Untyped:
        def look(self, where):  # type: ignore[no-untyped-def]
            """Looks.

            Args:
                where: A place.
            """

    with pytest.raises(ValueError, match="its method look can't be described"):
        as_episode(Untyped)


def test_calls_are_answered_until_a_reply_has_none() -> None:
    outcome, model, _ = play(ADD, "5")
    assert outcome.reward == 1.0
    assert told(model) == ["5"]
    assert [message["role"] for message in model.messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert play(ADD, "6")[0].reward == 0.0


def test_several_calls_of_one_reply() -> None:
    call = '<tool_call>{"name": "divide", "arguments": {"a": 1, "b": 4}}</tool_call>'
    _, model, _ = play(ADD + call, "5")
    assert told(model) == ["5", "0.25"]


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("<tool_call>{oops}</tool_call>", "Error: the call is not valid JSON"),
        ('<tool_call>["add"]</tool_call>', 'Error: the call is no object with a "name"'),
        (
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call>',
            "Error: there is no tool 'sub'",
        ),
        ('<tool_call>{"name": "_hidden"}</tool_call>', "Error: there is no tool '_hidden'"),
        ('<tool_call>{"name": "reward"}</tool_call>', "Error: there is no tool 'reward'"),
        ('<tool_call>{"name": "add"}</tool_call>', "Error: missing a required argument: 'a'"),
        (ADD.replace("2", '"2"'), 'Error: add: a is "2", which is no int'),
        (ADD.replace("2", "true"), "Error: add: a is true, which is no int"),
        (ADD.replace('"a"', '"c"'), "Error: missing a required argument: 'a'"),
        (
            '<tool_call>{"name": "divide", "arguments": {"a": 1, "b": 0}}</tool_call>',
            "Error: division by zero",
        ),
        (ADD.removesuffix("</tool_call>"), "Error: the call has no </tool_call>"),
        (f"<tool_call>{'[' * 3_000}</tool_call>", "Error: the call is nested too deeply"),
        (
            '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
            "Error: the call is no valid text",
        ),
    ],
)
def test_mistakes_are_told_to_the_policy(call: str, answer: str) -> None:
    outcome, model, _ = play(call, "5", reply_tokens=5_000)
    assert told(model)[0].startswith(answer)
    assert outcome.reward == 0.0


def test_calls_in_thoughts_are_none() -> None:
    assert read_calls(f"<think>perhaps {ADD}</think>5") == []
    assert read_calls(f"<think>perhaps {ADD}") == []
    assert read_calls(f"<think>so</think>{ADD}") == [
        ToolCall(name="add", arguments={"a": 2, "b": 3})
    ]
    bare = '{"name": "add", "parameters": {"a": 2}}'
    assert read_calls(bare) == [ToolCall(name="add", arguments={"a": 2})]
    assert read_calls('{"result": 5}') == []
    assert read_calls('{"name": "Ada", "age": 36}') == [], "an answer may have a name"


def test_a_limit_ends_with_the_reward_so_far() -> None:
    outcome, model, _ = play(*[ADD] * 20)
    assert len(model.transcript.turns) == 16
    assert model.finish_reason == "turns"
    assert outcome.reward == 0.0


def test_an_error_of_the_machine_is_no_message() -> None:
    class Broken(Arithmetic):
        def add(self, a: int, b: int = 1) -> int:
            """Adds.

            Args:
                a: One.
                b: Another.
            """
            raise ConnectionError("no calculator")

    model = conversation(saying([ADD, "5"]), reply_tokens=200)
    with pytest.raises(ConnectionError):
        asyncio.run(use(toolbox(Broken()), model, {"prompt": "2 + 3"}))


def test_tools_in_a_run(tmp_path: Path) -> None:
    """The template is given the schemas; tools without a reward need a function that scores."""
    settings = chat_settings(tmp_path) | {"actor.generation.max_model_len": 1024}
    settings["model.path"] = chat_model(tmp_path / "long", max_tokens=1024)
    with open_session(
        "grpo", settings | {"output_dir": tmp_path / "a"}, environment=Arithmetic
    ) as session:
        batch = session.actor.generate_sequences(next(session.prompts))
        prompt = session.tokenizer.decode(batch.ragged("prompt_ids").unbind()[0])
        assert '"description": "Adds two numbers."' in prompt
        assert session.step()["episode/turns"] == 1.0

    class NoReward:
        def look(self) -> str:
            """Looks."""
            return ""

    with pytest.raises(ValueError, match=r"has no method reward\(answer\)"):
        dry_run("grpo", settings, environment=NoReward)
    assert "grpo" in dry_run("grpo", settings, environment=NoReward, reward=by_length)


def by_length(*, response: str, **columns: object) -> float:
    return float(len(response))


def test_a_class_takes_a_tool_of_its_base_away() -> None:
    class Adds(Arithmetic):
        divide = None  # type: ignore[assignment]

    names = [name for name in tool_names(Arithmetic) if name != "divide"]
    assert "divide" in tool_names(Arithmetic) and tool_names(Adds) == names
    assert [schema["function"]["name"] for schema in schemas_of(Adds)] == names
