"""An agent by URL, with the client that it would have anyway."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.agents.chat import conversation, saying
from workers.agents.endpoint import Endpoint
from workers.agents.model import Model

openai = pytest.importorskip("openai")

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


async def agent(url: str) -> list[Any]:
    """A loop as thousands of them: complete, call, append."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "How much is 2 + 3?"}]
    completions = []
    while True:
        completion = await client.chat.completions.create(
            model="policy", messages=messages, tools=TOOLS, temperature=0.2
        )
        completions.append(completion)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            await client.close()
            return completions
        for call in message.tool_calls:
            numbers = json.loads(call.function.arguments)
            content = str(numbers["a"] + numbers["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def test_an_agent_with_its_own_client() -> None:
    """The transcript is that of an episode that spoke the same through Model.reply, and the ids in
    the answers are its."""
    model = conversation(saying([CALL, "5"]), reply_tokens=200)

    async def serve() -> list[Any]:
        async with Endpoint(model) as url:
            return await agent(url)

    called, answered = asyncio.run(serve())
    assert called.choices[0].finish_reason == "tool_calls"
    assert answered.choices[0].message.content == "5"
    same = conversation(saying([CALL, "5"]), reply_tokens=200)

    async def speak(model: Model) -> None:
        model.renderer.tools = TOOLS
        await model.reply([{"role": "user", "content": "How much is 2 + 3?"}])
        await model.reply([{"role": "tool", "content": "5"}])

    asyncio.run(speak(same))
    assert model.ids == same.ids
    assert model.transcript.sampled == same.transcript.sampled
    for completion, turn in zip((called, answered), model.transcript.turns, strict=True):
        ids = completion.choices[0].token_ids
        assert ids == model.ids[turn.start : turn.start + turn.length]
        assert completion.prompt_token_ids == model.ids[: turn.start]
        assert completion.usage.total_tokens == turn.start + turn.length


def test_a_limit_is_an_error_that_agents_know() -> None:
    model = conversation(saying(["one"]), context_tokens=10)

    async def serve() -> None:
        async with Endpoint(model) as url:
            client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
            try:
                await client.chat.completions.create(
                    model="policy", messages=[{"role": "user", "content": "x" * 50}]
                )
            finally:
                await client.close()

    with pytest.raises(openai.BadRequestError, match="context"):
        asyncio.run(serve())
    assert model.finish_reason == "context"
