"""Endpoint: an OpenAI-compatible URL for every episode, for agents that nobody rewrites.

    async def episode(model, task):
        async with Endpoint(model) as url:
            client = openai.AsyncOpenAI(base_url=url, api_key="none")
            ...                                     # the agent, with its own client
        return reward

    environment=my_module:episode

POST {url}/chat/completions answers one conversation. A request's messages must be those of the
episode so far and further ones behind them: what the policy said is matched by the text and calls
of its answer, and never tokenised again. A request that rewrites the conversation, or begins
another one, is refused with status 400 and the number of the first message that differs. Token ids
stand in the choice (token_ids, prompt_token_ids). temperature, top_p and the like are the run's:
values that differ from them are ignored. Leaves out streaming, n > 1 and rewritten conversations.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from workers.agents.model import Model, Reply
from workers.agents.outcome import EnvironmentMistake, LimitReached
from workers.agents.renderer import Message, Renderer
from workers.agents.tool_calls import BEGIN, ToolCall, read_calls, without_thoughts

FINISH = {"stop": "stop", "length": "length", "context": "length"}
"""A reply's finish reason -> OpenAI's."""


class Endpoint:
    """async with Endpoint(model) as url: ...

    Serves on the loopback address for as long as the block lasts.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._shown: list[Message] = []
        """The conversation as the client knows it."""
        self._one_at_a_time = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._mistake: EnvironmentMistake | None = None

    async def __aenter__(self) -> str:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._completions)
        application.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{port}/v1"

    async def __aexit__(self, *error: object) -> None:
        assert self._runner is not None, "it was entered"
        await self._runner.cleanup()
        if self._mistake is not None:
            raise self._mistake

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    async def _completions(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            return _refused("the body is no JSON")
        async with self._one_at_a_time:
            try:
                return await self._answer(body)
            except LimitReached as limit:
                return _refused(str(limit), code="context_length_exceeded")
            except EnvironmentMistake as error:
                self._mistake = error
                return _refused(str(error))

    async def _answer(self, body: dict[str, Any]) -> web.Response:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return _refused("messages is no list with a message")
        if body.get("stream") or body.get("n", 1) != 1:
            return _refused("stream and n over 1 are not supported")
        shown = [_comparable(message) for message in messages]
        for number, (before, now) in enumerate(zip(self._shown, shown, strict=False)):
            if before != now:
                return _refused(
                    f"message {number} (from 0) is not the one of the conversation so far; this "
                    "URL serves one conversation, which may only grow"
                )
        if len(shown) <= len(self._shown):
            return _refused("there is no message behind the last reply")
        if not self._shown:
            self._take_tools(body.get("tools"))
        new = [_for_template(message) for message in messages[len(self._shown) :]]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = await self.model.reply(new, max_tokens=limit)
        message = _message(reply)
        self._shown = [*shown, _comparable(message)]
        return web.json_response(self._response(reply, message))

    def _take_tools(self, tools: Sequence[Message] | None) -> None:
        """The client's tools, for the template."""
        if tools:
            self.model.renderer = Renderer(self.model.renderer.tokenizer, tools)

    def _response(self, reply: Reply, message: Message) -> dict[str, Any]:
        ids = self.model.ids
        num_prompt = len(ids) - len(reply.ids)
        reason = FINISH[reply.finish_reason]
        if message.get("tool_calls"):
            reason = "tool_calls"
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": reason,
            "token_ids": reply.ids,
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "policy",
            "choices": [choice],
            "prompt_token_ids": ids[:num_prompt],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": len(reply.ids),
                "total_tokens": len(ids),
            },
        }


def _refused(message: str, code: str = "invalid_request") -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return web.json_response({"error": error}, status=400)


def _message(reply: Reply) -> Message:
    """The reply as OpenAI's message: its calls apart from its text."""
    calls = [call for call in read_calls(reply.text) if not call.mistake]
    if not calls:
        return {"role": "assistant", "content": reply.text}
    spoken = without_thoughts(reply.text)
    content = reply.text.removesuffix(spoken)
    if BEGIN in spoken:
        content += spoken.partition(BEGIN)[0]
    return {
        "role": "assistant",
        "content": content.strip() or None,
        "tool_calls": [_call(call, number) for number, call in enumerate(calls)],
    }


def _call(call: ToolCall, number: int) -> dict[str, Any]:
    return {
        "id": f"call_{number}_{uuid.uuid4().hex[:8]}",
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
    }


def _text(content: Any) -> str:
    """A message's text, from a string, parts of text, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _comparable(message: Message) -> Message:
    """The parts by which messages are compared: role, text, the calls' names and arguments."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append((function["name"], function["arguments"]))
    return {"role": message.get("role"), "text": _text(message.get("content")), "calls": calls}


def _for_template(message: Message) -> Message:
    shown: Message = {"content": _text(message.get("content"))}
    for name in ("role", "name", "tool_call_id"):
        if name in message:
            shown[name] = message[name]
    return shown
