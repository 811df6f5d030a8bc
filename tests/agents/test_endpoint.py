"""An agent by URL, with the client that it would have anyway."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from tests.agents.chat import conversation, saying
from tests.agents.test_executor import run
from workers.agents.config import EpisodeConfig
from workers.agents.endpoint import Endpoint
from workers.agents.endpoint_messages import for_template, message_of
from workers.agents.model import Model, Reply
from workers.agents.outcome import Outcome, RequestRefused
from workers.agents.tool_calls import ToolCall, read_calls

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

    async def asks(client: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.chat.completions.create(model="policy", messages=[user("x" * 50)])

    served(model, asks)
    assert model.finish_reason == "context"


Client = Callable[[Any], Awaitable[Any]]


def served(model: Model, use: Client) -> Any:
    """What use(client) returns, whose URL is the model's."""

    async def serve() -> Any:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            return await use(client)

    return asyncio.run(serve())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_streamed_reply_is_the_reply() -> None:
    """stream=True: text, calls, how it ended, usage; the transcript is the plain request's."""

    async def streams(client: Any) -> list[Any]:
        completion = await client.chat.completions.create(
            model="policy",
            messages=[user("2 + 3?")],
            tools=TOOLS,
            stream=True,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in completion]

    words = f"So: {CALL}{CALL.replace('2', '7')}"
    model = conversation(saying([words]), reply_tokens=300)
    first, *calls, last, usage = served(model, streams)
    for number, chunk in enumerate(calls):
        (call,) = chunk.choices[0].delta.tool_calls
        assert (call.index, call.function.name) == (number, "add")
        assert json.loads(call.function.arguments) == {"a": (2, 7)[number], "b": 3}
    assert len(calls) == 2 and first.choices[0].delta.content == "So:"
    assert last.choices[0].finish_reason == "tool_calls"
    assert usage.usage.total_tokens == len(model.ids)
    same = conversation(saying([words]), reply_tokens=300)

    async def plain(client: Any) -> Any:
        return await client.chat.completions.create(
            model="policy", messages=[user("2 + 3?")], tools=TOOLS
        )

    served(same, plain)
    assert model.ids == same.ids


def test_a_reply_ends_before_a_stop_text() -> None:
    """What was drawn behind it is not in the row; the conversation goes on from there, and the
    turn gets its end token, which nobody drew."""
    model = conversation(saying(["Look it up.\nObservation: 7 or 8", "7"]), reply_tokens=200)

    async def stops(client: Any) -> list[Any]:
        ask = functools.partial(client.chat.completions.create, model="policy")
        first = await ask(messages=[user("a")], stop=["Observation:", "never"], logprobs=True)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        second = await ask(messages=[user("a"), said, user("Observation: 7")])
        return [first, second]

    first, second = served(model, stops)
    choice = first.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Look it up.\n", "stop")
    decode = model.renderer.tokenizer.decode
    assert decode(choice.token_ids) == "Look it up.\nObservation:"
    assert [entry.logprob for entry in choice.logprobs.content] == [-0.5] * len(choice.token_ids)
    assert "".join(entry.token for entry in choice.logprobs.content) == decode(choice.token_ids)
    assert second.choices[0].message.content == "7"
    assert len(model.segments.transcripts) == 1, "the shortened reply is known again"
    assert decode(model.ids).endswith(
        "Observation:<|end|>\n<|user|>\nObservation: 7<|end|>\n<|assistant|>\n7<|end|>"
    )
    turn = model.transcript.turns[0]
    assert not model.transcript.sampled[turn.start + turn.length]
    assert len(model.transcript.log_probs) == sum(model.transcript.sampled)


@pytest.mark.parametrize(
    "option, fix",
    [
        ({"n": 2}, "n=2: a request has one reply; leave n out"),
        ({"n": 0}, "n=0: a request has one reply; leave n out"),
        ({"response_format": {"type": "json_object"}}, "response_format: .*leave"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs=3: .*leave it out"),
        ({"logit_bias": {"5": 1}}, "logit_bias=.*leave it out"),
        ({"functions": [{"name": "add"}]}, "functions=.*: an older form; use tools"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is no function"),
        ({"stop": [""]}, "give texts that are not empty"),
        ({"max_tokens": 0}, "max_tokens=0: give a whole number"),
        ({"max_completion_tokens": True}, "max_tokens=True: give a whole number"),
        ({"stop": 3}, "stop=3: give texts"),
        ({"stream_options": 1}, "stream_options=1: give an object"),
        ({"tools": {"a": 1}}, "tools is no list"),
        ({"tool_choice": "any"}, "tool_choice='any': use auto, none, required or a function"),
        ({"response_format": {"type": "json_schema"}}, "response_format: .*leave"),
        ({"modalities": ["text", "audio"]}, "modalities: the policy writes text alone"),
        (
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
            "chat_template_kwargs=",
        ),
        ({"extra_body": {"stop_token_ids": [3]}}, "stop_token_ids=.3.: use stop, with texts"),
        ({"messages": []}, "messages is no list with a message"),
        ({"messages": ["Hi"]}, r"messages\[0\] is no object with a role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is no text"),
        (
            {"messages": [user("a"), {"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[1\].content has a part 'image_url'; the policy reads text alone",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]},
            r"messages\[0\].tool_calls has one without",
        ),
    ],
)
def test_what_can_not_be_had_is_refused(option: dict[str, Any], fix: str) -> None:
    async def asks(client: Any) -> Any:
        request = {"model": "policy", "messages": [user("a")]} | option
        return await client.chat.completions.create(**request)

    model = conversation(saying(["one"]))
    with pytest.raises(openai.BadRequestError, match=fix):
        served(model, asks)
    assert not model.transcript.turns


DEEP = b"""{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "f", "x":
    %s1%s}}]}""" % (b'{"a":' * 900, b"}" * 900)


@pytest.mark.parametrize(
    "body, header, fix",
    [
        (b"[" * 200_000, {}, "the body is no JSON"),
        (b"{}", {"Content-Type": "application/json; charset=nope"}, "the body is no JSON"),
        (b'{"messages": [{"role": "user", "tool_calls": 5}]}', {}, "tool_calls is no list"),
        (b"no gzip", {"Content-Encoding": "gzip"}, "the body can't be read .*gzip"),
        (DEEP, {}, "the request is nested too deeply"),
    ],
)
def test_a_body_that_can_not_be_read_is_refused(
    body: bytes, header: dict[str, str], fix: str
) -> None:
    """An answer that names it; an agent that swallows that has failed."""
    headers = {"Content-Type": "application/json"} | header
    model = conversation(saying([]))

    async def serve() -> int:
        async with Endpoint(model) as url, aiohttp.ClientSession() as client:
            answer = await client.post(f"{url}/chat/completions", data=body, headers=headers)
            assert re.search(fix, (await answer.json())["error"]["message"])
            assert answer.status == 400
            return answer.status

    with pytest.raises(RequestRefused, match=fix):
        asyncio.run(serve())


def test_another_path_is_named() -> None:
    async def asks(client: Any) -> Any:
        return await client.responses.create(model="policy", input="a")

    with pytest.raises(openai.NotFoundError, match="let the client use chat completions"):
        served(conversation(saying(["one"])), asks)


def test_options_that_are_the_runs() -> None:
    """Sampling's options and tool_choice are taken, and change nothing; with tool_choice=none a
    call is text."""

    async def asks(client: Any) -> list[Any]:
        ask = functools.partial(client.chat.completions.create, model="policy", tools=TOOLS)
        options = {"temperature": 0.0, "top_p": 0.5, "seed": 3, "presence_penalty": 1.0}
        free = await ask(messages=[user("a")], tool_choice="required", **options)
        text = await ask(messages=[user("b")], tool_choice="none")
        return [free, text]

    free, text = served(conversation(saying([CALL, CALL]), reply_tokens=200), asks)
    assert free.choices[0].message.tool_calls
    assert text.choices[0].message.content == CALL and not text.choices[0].message.tool_calls


@pytest.mark.parametrize("text", [CALL, '{"name": "Ada", "arguments": {"age": 36}}'])
def test_without_tools_a_reply_is_text(text: str) -> None:
    """An agent that describes its tools in a prompt reads calls out of the text itself, and one
    that asks for JSON gets what was said."""

    async def asks(client: Any) -> list[Any]:
        ask = functools.partial(client.chat.completions.create, model="policy")
        first = await ask(messages=[user("a")])
        said = first.choices[0].message.model_dump(exclude_none=True)
        return [first, await ask(messages=[user("a"), said, user("b")])]

    model = conversation(saying([text, "5"]), reply_tokens=200)
    first, second = served(model, asks)
    assert first.choices[0].message.content == text and not first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == "5" and len(model.segments.transcripts) == 1


def test_requests_side_by_side_and_other_tools() -> None:
    """An agent with sub-agents asks for several replies at once; each conversation has the tools
    that it was begun with."""
    replies = ["one", "two", "three", "four"]

    async def asks(client: Any) -> list[Any]:
        ask = functools.partial(client.chat.completions.create, model="policy")
        first = await asyncio.gather(*[ask(messages=[user(text)]) for text in "abc"])
        said = {"role": "assistant", "content": first[0].choices[0].message.content}
        return [*first, await ask(messages=[user("a"), said, user("d")], tools=TOOLS)]

    model = conversation(saying(replies), reply_tokens=200)
    completions = served(model, asks)
    assert sorted(each.choices[0].message.content for each in completions) == sorted(replies)
    transcripts = model.segments.transcripts
    assert [len(transcript.turns) for transcript in transcripts] == [1] * 4
    decode = model.renderer.tokenizer.decode
    assert [("Adds." in decode(each.ids)) for each in transcripts] == [False] * 3 + [True]


def test_a_history_that_is_still_too_long_can_be_shortened_again() -> None:
    async def asks(client: Any) -> Any:
        await client.chat.completions.create(model="policy", messages=[user("a")])
        for length in (500, 300, 5):
            try:
                return await client.chat.completions.create(
                    model="policy", messages=[user("x" * length)]
                )
            except openai.BadRequestError as error:
                assert error.code == "context_length_exceeded"
        return None

    model = conversation(saying(["one", "two"]), context_tokens=100)
    assert served(model, asks).choices[0].message.content == "two"


def test_a_tool_s_result_can_be_shortened() -> None:
    """The conversation goes on with the shorter one, without a trace of the other."""

    async def asks(client: Any) -> None:
        ask = functools.partial(client.chat.completions.create, model="policy")
        first = await ask(messages=[user("a")])
        history = [user("a"), first.choices[0].message.model_dump(exclude_none=True)]
        with pytest.raises(openai.BadRequestError, match="context"):
            await ask(messages=[*history, user("x" * 500)])
        await ask(messages=[*history, user("short")])

    model = conversation(saying(["one", "two"]), context_tokens=100)
    served(model, asks)
    assert len(model.segments.transcripts) == 1
    assert model.renderer.tokenizer.decode(model.ids) == (
        "<|user|>\na<|end|>\n<|assistant|>\none<|end|>"
        "\n<|user|>\nshort<|end|>\n<|assistant|>\ntwo<|end|>"
    )


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_an_agent_that_meets_a_limit_has_not_failed(in_a_thread: bool) -> None:
    """Trap 14 from the other side: its client's error ends the episode with reward 0."""

    def by_hand(url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            while True:
                client.chat.completions.create(model="policy", messages=[user("a")])

    async def episode(model: Model, task: dict[str, Any]) -> float:
        async with Endpoint(model) as url:
            await asyncio.to_thread(by_hand, url)
        return 1.0

    async def with_a_loop(model: Model, task: dict[str, Any]) -> float:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            while True:
                await client.chat.completions.create(model="policy", messages=[user("a")])

    config = EpisodeConfig(max_turns=3, retries=0)
    finished, _ = run(episode if in_a_thread else with_a_loop, 1, config)
    assert finished[0].outcome == Outcome(reward=0.0) and not finished[0].failures
    assert finished[0].segments.finish_reason == "turns"


def test_an_agent_that_fails_behind_a_limit_has_failed() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            ask = functools.partial(client.chat.completions.create, model="policy")
            with pytest.raises(openai.BadRequestError):
                await ask(messages=[user("x" * 2000)])
            await ask(messages=[user("a")])
            raise ConnectionError("no sandbox")

    finished, _ = run(episode, 1, EpisodeConfig(retries=0))
    assert finished[0].outcome is None
    assert finished[0].failures[0].kind == "ConnectionError"


def test_a_name_of_a_tool_may_have_quotes() -> None:
    """Where an agent's history begins another segment, the policy reads calls as valid JSON."""
    called = [{"function": {"name": 'a"b\n', "arguments": '{"é": 1}'}}]
    shown = for_template({"role": "assistant", "content": None, "tool_calls": called})
    (call,) = read_calls(shown["content"])
    assert call == ToolCall(name='a"b\n', arguments={"é": 1})
    drawn = Reply(text=shown["content"], message={}, ids=[], log_probs=[], finish_reason="stop")
    assert for_template(message_of(drawn)) == shown
