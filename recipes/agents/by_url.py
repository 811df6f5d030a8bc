"""The calculator's task for an agent that nobody rewrote: a loop around OpenAI's own client, which
knows a URL and nothing of training. It needs the package openai."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import openai

from recipes.agents.calculator import Calculator, value_of
from workers.agents.endpoint import Endpoint
from workers.agents.model import Model
from workers.agents.renderer import Message
from workers.agents.tools import schemas_of

TOOLS = schemas_of(Calculator)


async def episode(model: Model, task: dict[str, Any]) -> float:
    """environment=recipes.agents.by_url:episode"""
    async with Endpoint(model) as url:
        answer = await agent(url, task["prompt"])
    return float(answer == f"={task['answer']}")


async def agent(url: str, prompt: Sequence[Message]) -> str:
    """The last words of the policy at `url`, whose calls are answered before."""
    # Without certificates, which take longer to load than an episode takes.
    client = openai.DefaultAsyncHttpxClient(verify=False)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=client) as policy:
        messages: list[Any] = list(prompt)
        tools: Any = TOOLS
        while True:
            completion = await policy.chat.completions.create(
                model="policy", messages=messages, tools=tools
            )
            message: Any = completion.choices[0].message
            if not message.tool_calls:
                return str(message.content)
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                content = result_of(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def result_of(arguments: str) -> str:
    """What the calculator says to a call's arguments."""
    try:
        return str(value_of(json.loads(arguments)["expression"]))
    except (LookupError, TypeError, ValueError) as error:
        return f"Error: {error}"
