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
stand in the choice (token_ids, prompt_token_ids). What a request may ask for besides is
endpoint_options.py's. Leaves out every other path of OpenAI's.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from workers.agents.endpoint_messages import comparable, for_template, message_of, problem_of
from workers.agents.endpoint_options import Options, options_of
from workers.agents.endpoint_stream import stream
from workers.agents.model import Model, Reply
from workers.agents.outcome import EnvironmentMistake, LimitReached, RequestRefused
from workers.agents.renderer import Message

POLICY = {"id": "policy", "object": "model", "created": 0, "owned_by": "hybridflow"}
MOST_FILES = 65536
FINISH = {"stop": "stop", "length": "length", "context": "length"}
"""A reply's finish reason -> OpenAI's."""


@dataclass(slots=True)
class Conversation:
    """One that a client has with the policy."""

    model: Model
    tools: Sequence[Message]
    shown: list[Message] = field(default_factory=list)
    """Its messages as the client knows them."""


def _num_messages(conversation: Conversation) -> int:
    return len(conversation.shown)


class Endpoint:
    """async with Endpoint(model) as url: ...

    Serves on the loopback address for as long as the block lasts.
    """

    def __init__(self, model: Model) -> None:
        self.model, self._renderer = model, model.renderer
        self._conversations: list[Conversation] = []
        self._one_at_a_time = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._mistake: EnvironmentMistake | None = None
        self._limit: LimitReached | None = None
        """The limit that the last request met."""
        self._drawing: set[asyncio.Task[Any]] = set()
        """Those that answer a request."""
        self._num_answered = 0
        self._refusal = ""
        """Why the last request got no answer, where no limit was the reason."""

    async def __aenter__(self) -> str:
        application = web.Application(client_max_size=0)  # any size: the context is the limit
        application.router.add_post("/v1/chat/completions", self._completions)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/v1/models/{name:.+}", self._model)
        application.router.add_route("*", "/{path:.*}", self._elsewhere)
        # A request whose client has closed the connection is drawn no further, and what was drawn
        # is not in the row.
        _allow_files()
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{port}/v1"

    async def __aexit__(self, kind: object, error: BaseException | None, place: object) -> None:
        assert self._runner is not None, "it was entered"
        for request in self._drawing:
            request.cancel()  # its agent has ended
        await self._runner.cleanup()
        if self._mistake is not None:
            raise self._mistake
        if self._limit is not None and isinstance(error, Exception):
            raise self._limit from error  # the agent's way to end there, and no failure
        if self._refusal and error is None:
            raise RequestRefused(f"the agent's last request got no answer: {self._refusal}")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [POLICY]})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(POLICY | {"id": request.match_info["name"]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        refusal = (
            f"{request.method} {request.path} is not served here; let the client use chat "
            "completions (POST /v1/chat/completions)"
        )
        if request.method == "POST":
            self._refusal = refusal
        return _refused(refusal, status=404)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise ValueError("the body is no JSON object")
            if problem := problem_of(body.get("messages")):
                raise ValueError(problem)
            options = options_of(body)
        except web.RequestPayloadError as error:
            self._refusal = f"the body can't be read ({' '.join(str(error).split())})"
            return _refused(self._refusal)
        except (ValueError, LookupError, RecursionError) as error:
            self._refusal = str(error)
            # LookupError: a charset that nobody knows; RecursionError: nested too deep.
            no_json = json.JSONDecodeError, UnicodeDecodeError, LookupError, RecursionError
            if isinstance(error, no_json):
                self._refusal = "the body is no JSON"
            return _refused(self._refusal)
        answering = asyncio.current_task()
        assert answering is not None, "a handler runs in a task"
        self._drawing.add(answering)
        before = self._num_answered
        try:
            return await self._answered(request, body["messages"], options)
        except asyncio.CancelledError:
            if before == self._num_answered:  # else the agent took the answer to another one
                self._refusal = (
                    "its client closed the connection, or the agent ended, before the reply was "
                    "there; give the client a longer timeout"
                )
            raise
        finally:
            self._drawing.discard(answering)

    async def _answered(
        self, request: web.Request, messages: list[Message], options: Options
    ) -> web.StreamResponse:
        """The response, after those of earlier requests."""
        async with self._one_at_a_time:
            self._limit, self._refusal = None, ""
            try:
                completion = await self._answer(messages, options)
            except LimitReached as limit:
                self._limit = limit
                return _refused(str(limit), code="context_length_exceeded")
            except EnvironmentMistake as error:
                self._mistake = error
                return _refused(str(error))
            except RecursionError:
                self._refusal = "the request is nested too deeply; let its tools be flatter"
                return _refused(self._refusal)
            except Exception as error:
                self._refusal = f"{type(error).__name__}: {error}"
                raise
        if options.streams:
            return await stream(request, completion, usage=options.streams_usage)
        return web.json_response(completion)

    async def _answer(self, messages: list[Message], options: Options) -> dict[str, Any]:
        shown = [comparable(message) for message in messages]
        conversation = self._conversation(shown, options.tools)
        model = conversation.model
        if not conversation.shown and options.tools:
            model.use_tools(options.tools)
        new = [for_template(message) for message in messages[len(conversation.shown) :]]
        reply = await model.reply(new, max_tokens=options.max_tokens, stop=options.stop)
        message = message_of(reply, most=options.most_calls)
        conversation.shown = [*shown, comparable(message)]
        self._num_answered += 1
        return self._response(model, reply, message, options)

    def _conversation(self, shown: Sequence[Message], tools: Sequence[Message]) -> Conversation:
        """The longest conversation that these messages go on with, which has the same tools, or a
        new one: the template writes tools at the beginning."""
        going_on = []
        for conversation in self._conversations:
            length = len(conversation.shown)
            begins = 0 < length < len(shown) and conversation.shown == shown[:length]
            if begins and conversation.tools == tools:
                going_on.append(conversation)
        if going_on:
            return max(going_on, key=_num_messages)
        model = self.model
        if self._conversations:
            model = model.fork()
            model.renderer = self._renderer  # without the tools of another conversation
        self._conversations.append(Conversation(model, tools))
        return self._conversations[-1]

    def _response(
        self, model: Model, reply: Reply, message: Message, options: Options
    ) -> dict[str, Any]:
        ids = model.ids
        num_prompt = len(ids) - len(reply.ids)
        reason = FINISH[reply.finish_reason]
        if message.get("tool_calls"):
            reason = "tool_calls"
        choice: dict[str, Any] = {
            "index": 0,
            "message": message,
            "finish_reason": reason,
            "token_ids": reply.ids,
        }
        if options.log_probs:
            choice["logprobs"] = {"content": _log_probs(model, reply), "refusal": None}
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


def _allow_files() -> None:
    """Raises the process's limit of open files: each episode has about three, and the usual 1024
    would leave clients waiting without a word."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _log_probs(model: Model, reply: Reply) -> list[dict[str, Any]]:
    """OpenAI's entry for every token that was drawn."""
    entries = []
    for token_id, log_prob in zip(reply.ids, reply.log_probs, strict=True):
        token = str(model.renderer.tokenizer.decode([token_id]))
        entry = {"token": token, "logprob": log_prob, "bytes": list(token.encode())}
        entries.append(entry | {"top_logprobs": []})
    return entries


def _refused(message: str, code: str = "invalid_request", status: int = 400) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return web.json_response({"error": error}, status=status)
