"""Requests to an agent's URL: the fields that clients send, what they give up, and refusals that agents
swallow."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.agents.chat import conversation, drawn, saying
from tests.agents.test_endpoint import CALL, TOOLS, served, user
from tests.agents.test_executor import run
from workers.agents import endpoint_options
from workers.agents.config import EpisodeConfig
from workers.agents.endpoint import Endpoint
from workers.agents.executor import Episodes, Executor
from workers.agents.live import Finished
from workers.agents.model import Drawn, Model, Request
from workers.agents.outcome import Outcome
from workers.agents.rows import in_order

openai = pytest.importorskip("openai")


def test_the_fields_of_a_usual_request(caplog: pytest.LogCaptureFixture) -> None:
    """What the client of OpenAI sends: parts of text, a developer, fields without effect; one that
    nothing reads is named once."""

    async def asks(client: Any) -> Any:
        parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "much?"}]
        question = {"role": "user", "content": parts}
        for _ in range(2):
            answer = await client.chat.completions.create(
                model="gpt-5",
                messages=[{"role": "developer", "content": "Be brief."}, question],
                max_completion_tokens=3,
                modalities=["text"],
                response_format={"type": "text"},
                tool_choice="auto",
                user="me",
                store=True,
                metadata={"a": "b"},
                reasoning_effort="low",
            )
        assert (await client.models.retrieve("gpt-5")).id == "gpt-5"
        return answer

    model = conversation(saying(["one two three"] * 2), reply_tokens=200)
    with caplog.at_level("WARNING"):
        answer = served(model, asks)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    text = model.renderer.tokenizer.decode(model.ids)
    assert "<|developer|>\nBe brief.<|end|>\n<|user|>\nHow much?<|end|>" in text
    assert caplog.text.count("reasoning_effort") == 1 and "metadata" not in caplog.text


def test_one_call_where_calls_are_not_parallel(caplog: pytest.LogCaptureFixture) -> None:
    """The first call alone, and the conversation goes on behind all that was drawn; a tool_choice
    that is not enforced is named."""
    words = f"{CALL}{CALL.replace('2', '7')}"
    endpoint_options._told.clear()

    async def asks(client: Any) -> Any:
        ask = functools.partial(
            client.chat.completions.create,
            model="policy",
            tools=TOOLS,
            parallel_tool_calls=False,
            tool_choice={"type": "function", "function": {"name": "add"}},
        )
        first = await ask(messages=[user("a")])
        (call,) = first.choices[0].message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
        said = first.choices[0].message.model_dump(exclude_none=True)
        await ask(messages=[user("a"), said, result])
        return json.loads(call.function.arguments)

    model = conversation(saying([words, "5"]), reply_tokens=300)
    with caplog.at_level("WARNING"):
        assert served(model, asks) == {"a": 2, "b": 3}
    assert len(model.segments.transcripts) == 1
    assert words in model.renderer.tokenizer.decode(model.ids)
    assert "tool_choice" in caplog.text and "is not enforced" in caplog.text


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_request_that_its_client_gave_up_is_not_in_the_row(in_a_thread: bool) -> None:
    """The client's timeout closes the connection while the reply is drawn: the engine's answer is
    dropped, and the client's next try is the plain episode."""
    given_up, came = asyncio.Event(), 0
    replies = saying(["one", "two"])

    async def draw(request: Request) -> Drawn:
        nonlocal came
        came += 1
        if came == 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                given_up.set()
                raise
        return await replies(request)

    def tries(client: Any) -> str:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="policy", messages=[user("a")], timeout=0.2)
        answer = client.chat.completions.create(model="policy", messages=[user("a")])
        return str(answer.choices[0].message.content)

    def in_thread(url: str) -> str:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return tries(client)

    async def episode() -> str:
        async with Endpoint(model) as url:
            if in_a_thread:
                return await asyncio.to_thread(in_thread, url)
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                ask = functools.partial(
                    client.chat.completions.create, model="policy", messages=[user("a")]
                )
                with pytest.raises(openai.APITimeoutError):
                    await ask(timeout=0.2)
                await asyncio.wait_for(given_up.wait(), 5)
                return str((await ask()).choices[0].message.content)

    model = conversation(draw)
    assert asyncio.run(episode()) == "one"
    same = conversation(saying(["one"]))
    asyncio.run(same.reply([user("a")]))
    spoken = in_order(model.segments.transcripts)
    assert [transcript.ids for transcript in spoken] == [same.ids]
    assert (came, model.segments.num_turns) == (2, 1)


def swallows(request: dict[str, Any], then: int = 0) -> Any:
    """An agent that goes on with reward 0 whatever happens to its request."""

    async def episode(model: Model, task: dict[str, Any]) -> float:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            with contextlib.suppress(openai.OpenAIError):
                plain = {"model": "policy", "messages": [user("a")]}
                await client.chat.completions.create(**(plain | request))
            for _ in range(then):
                await client.chat.completions.create(model="policy", messages=[user("a")])
            return 0.0

    return episode


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format: replies are not held"),
        ({"n": 3}, "n=3: a request has one reply"),
        ({"timeout": 0.05}, "its client closed the connection, or the agent ended"),
    ],
)
def test_a_refusal_that_an_agent_swallows_is_no_reward(
    request_: dict[str, Any], reason: str
) -> None:
    """Nothing was answered, so its reward of 0 is nobody's; where a later request is answered, the
    agent has found its way."""

    def slow(requests: Sequence[Request]) -> list[Drawn]:
        time.sleep(0.3)
        return [drawn("one") for _ in requests]

    def outcome(then: int) -> Finished:
        begin = functools.partial(
            Episodes,
            swallows(request_, then),
            "test",
            EpisodeConfig(retries=0),
            lambda row, draw: conversation(draw, row=row),
        )
        executor = Executor(begin, slow, lockstep=True)
        (finished,) = executor.run([{"row": 0}])
        return finished

    (failure,) = outcome(0).failures
    assert failure.kind == "RequestRefused" and reason in failure.text
    recovered = outcome(1)
    assert recovered.outcome == Outcome(reward=0.0) and recovered.segments.num_turns == 1


def test_an_agent_that_takes_the_first_answer_has_not_failed() -> None:
    """Requests that are raced: the others are closed once one has its answer."""

    async def episode(model: Model, task: dict[str, Any]) -> float:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            ask = functools.partial(client.chat.completions.create, model="policy")
            asked = [asyncio.create_task(ask(messages=[user(text)])) for text in "abc"]
            done, others = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for each in others:
                each.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            return float(len(done))

    finished, _ = run(episode, 1, EpisodeConfig(retries=0))
    assert finished[0].outcome == Outcome(reward=1.0)


def test_many_episodes_have_files_enough() -> None:
    """The usual limit of 1024 open files is too few for the connections of some hundred agents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(list(Path("/proc/self/fd").iterdir())) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))

    async def episode(model: Model, task: dict[str, Any]) -> float:
        async with Endpoint(model) as url, aiohttp.ClientSession() as client:
            body = {"messages": [{"role": "user", "content": "Go"}]}
            async with client.post(f"{url}/chat/completions", json=body) as answer:
                return float(answer.status)

    try:
        finished, _ = run(episode, 20, EpisodeConfig(retries=0, step_timeout_s=20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [episode.outcome and episode.outcome.reward for episode in finished] == [200.0] * 20
