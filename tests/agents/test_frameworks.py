"""Agent frameworks against an Endpoint, where they are installed: each calls a tool of its own and
answers, and every reply is the policy's."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from transformers.utils import get_json_schema

from tests.agents.chat import conversation, saying
from workers.agents.endpoint import Endpoint

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
QUESTION = "How much is 2 + 3?"


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def openai_agents(url: str) -> str:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    openai = pytest.importorskip("openai")
    agents.set_tracing_disabled(True)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        agent = agents.Agent(
            name="sums",
            instructions="Use the tool.",
            tools=[agents.function_tool(add)],
            model=agents.OpenAIChatCompletionsModel(model="policy", openai_client=client),
        )
        return str((await agents.Runner.run(agent, QUESTION)).final_output)


async def pydantic_ai(url: str) -> str:
    package = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=url, api_key="none")
    agent = package.Agent(models.OpenAIChatModel("policy", provider=provider), tools=[add])
    return str((await agent.run(QUESTION)).output)


async def smolagents(url: str) -> str:
    package = pytest.importorskip("smolagents")
    model = package.OpenAIServerModel(model_id="policy", api_base=url, api_key="none")
    agent = package.ToolCallingAgent(
        tools=[package.tool(add)], model=model, verbosity_level=0, max_steps=3
    )
    return str(await asyncio.to_thread(agent.run, QUESTION))


async def langgraph(url: str) -> str:
    models = pytest.importorskip("langchain_openai")
    prebuilt = pytest.importorskip("langgraph.prebuilt")
    model = models.ChatOpenAI(model="policy", base_url=url, api_key="none", streaming=True)
    agent = prebuilt.create_react_agent(model, [add])
    state = await agent.ainvoke({"messages": [("user", QUESTION)]})
    return str(state["messages"][-1].content)


async def llama_index(url: str) -> str:
    llms = pytest.importorskip("llama_index.llms.openai_like")
    workflow = pytest.importorskip("llama_index.core.agent.workflow")
    model = llms.OpenAILike(
        model="policy",
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
    )
    return str(await workflow.FunctionAgent(tools=[add], llm=model).run(QUESTION))


async def agno(url: str) -> str:
    package = pytest.importorskip("agno.agent")
    models = pytest.importorskip("agno.models.openai")
    model = models.OpenAILike(id="policy", base_url=url, api_key="none")
    return str(
        (await package.Agent(model=model, tools=[add], telemetry=False).arun(QUESTION)).content
    )


async def autogen(url: str) -> str:
    agents = pytest.importorskip("autogen_agentchat.agents")
    models = pytest.importorskip("autogen_ext.models.openai")
    can = {"vision": False, "function_calling": True, "json_output": False, "family": "unknown"}
    client = models.OpenAIChatCompletionClient(
        model="policy",
        base_url=url,
        api_key="none",
        model_info=can | {"structured_output": False},
    )
    agent = agents.AssistantAgent(
        "sums", model_client=client, tools=[add], reflect_on_tool_use=True
    )
    answer = str((await agent.run(task=QUESTION)).messages[-1].content)
    await client.close()
    return answer


async def litellm(url: str) -> str:
    package = pytest.importorskip("litellm")
    tool = {"type": "function", "function": get_json_schema(add)["function"]}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    ask = functools.partial(
        package.acompletion, model="openai/policy", api_base=url, api_key="none", tools=[tool]
    )
    while (message := (await ask(messages=messages)).choices[0].message).tool_calls:
        messages.append(message.model_dump())
        for call in message.tool_calls:
            content = str(add(**json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return str(message.content)


FINAL = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "5"}}\n</tool_call>'


@pytest.mark.parametrize(
    "agent, last",
    [
        (openai_agents, "5"),
        (pydantic_ai, "5"),
        (smolagents, FINAL),
        (langgraph, "5"),
        (llama_index, "5"),
        (agno, "5"),
        (autogen, "5"),
        (litellm, "5"),
    ],
)
def test_a_framework_by_url(agent: Callable[[str], Awaitable[str]], last: str) -> None:
    model = conversation(saying([CALL, last]), reply_tokens=300, context_tokens=50_000)

    async def episode() -> str:
        async with Endpoint(model) as url:
            return await agent(url)

    assert asyncio.run(episode()) == "5"
    decode = model.renderer.tokenizer.decode
    segments = model.segments.transcripts
    # smolagents writes earlier calls in words of its own, and autogen reflects without tools: the
    # second request is a segment.
    assert len(segments) == (2 if agent in (smolagents, autogen) else 1)
    drawn = []
    for transcript in segments:
        for turn in transcript.turns:
            drawn.append(decode(transcript.ids[turn.start : turn.start + turn.length]))
    assert drawn == [CALL + "<|end|>", last + "<|end|>"]
    assert "5" in decode(segments[-1].ids[: segments[-1].turns[-1].start])
