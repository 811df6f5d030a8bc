"""Endpoint: an OpenAI-compatible URL for every episode, for agents that nobody rewrites.

    async def episode(model, task):
        async with Endpoint(model) as url:
            client = openai.AsyncOpenAI(base_url=url, api_key="none")
            ...                                     # the agent, with its own client
        return reward

    environment=my_module:episode

A request to POST {url}/chat/completions goes on with the conversation of the episode that its
messages begin with: what the policy said there is matched by the text and calls of its answer, and
never tokenised again. Messages that go on with none (a history that was rewritten or shortened, a
sub-agent) begin another conversation, which becomes a further segment of the episode. Token ids
stand in the choice (token_ids, prompt_token_ids). temperature, top_p and the like are the run's:
values that differ from them are ignored. Leaves out streaming and n > 1.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from workers.agents.model import Model, Reply
from workers.agents.outcome import EnvironmentMistake, LimitReached
from workers.agents.renderer import Message
from workers.agents.tool_calls import BEGIN, END, ToolCall, read_calls, without_thoughts

FINISH = {"stop": "stop", "length": "length", "context": "length"}
"""A reply's finish reason -> OpenAI's."""


@dataclass(slots=True)
class Conversation:
    """One that a client has with the policy."""

    model: Model
    shown: list[Message] = field(default_factory=list)
    """Its messages as the client knows them."""


def _num_messages(conversation: Conversation) -> int:
    return len(conversation.shown)


class Endpoint:
    """async with Endpoint(model) as url: ...

    Serves on the loopback address for as long as the block lasts.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._conversations: list[Conversation] = []
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
        conversation = self._conversation(shown)
        model = conversation.model
        if not conversation.shown and body.get("tools"):
            model.use_tools(body["tools"])
        new = [_for_template(message) for message in messages[len(conversation.shown) :]]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = await model.reply(new, max_tokens=limit)
        message = _message(reply)
        conversation.shown = [*shown, _comparable(message)]
        return web.json_response(self._response(model.ids, reply, message))

    def _conversation(self, shown: Sequence[Message]) -> Conversation:
        """The longest conversation that these messages go on with, or a new one."""
        going_on = []
        for conversation in self._conversations:
            length = len(conversation.shown)
            if length < len(shown) and conversation.shown == shown[:length]:
                going_on.append(conversation)
        if going_on:
            return max(going_on, key=_num_messages)
        model = self.model
        if self._conversations:
            model = model.fork()
        self._conversations.append(Conversation(model))
        return self._conversations[-1]

    def _response(self, ids: list[int], reply: Reply, message: Message) -> dict[str, Any]:
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
    calls: list[tuple[str, object]] = []
    for name, arguments in _calls(message):
        # Clients write the same JSON with other spaces.
        try:
            calls.append((name, json.loads(arguments)))
        except ValueError:
            calls.append((name, arguments))
    return {"role": message.get("role"), "text": _text(message.get("content")), "calls": calls}


def _calls(message: Message) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of each call."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append((function["name"], function["arguments"]))
    return calls


def _for_template(message: Message) -> Message:
    """The message in the words that the policy would have drawn."""
    shown: Message = {"content": _text(message.get("content"))}
    for name, arguments in _calls(message):
        shown["content"] += f'{BEGIN}\n{{"name": "{name}", "arguments": {arguments}}}\n{END}'
    for name in ("role", "name", "tool_call_id"):
        if name in message:
            shown[name] = message[name]
    return shown
