"""A finished completion in the form of OpenAI's stream: server-sent events.

The whole reply comes at once, its text and each of its calls in an event of its own, since replies of
many episodes are drawn together; clients that ask for a stream work as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web


async def stream(
    request: web.Request, completion: Mapping[str, Any], *, usage: bool
) -> web.StreamResponse:
    """Sends the completion: its message, how it ended, with `usage` its usage, and [DONE]."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    for chunk in chunks(completion, usage=usage):
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def chunks(completion: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """The events' objects."""
    (choice,) = completion["choices"]
    message = dict(choice["message"])
    calls = message.pop("tool_calls", [])
    same = {name: completion[name] for name in ("id", "created", "model")}
    same["object"] = "chat.completion.chunk"
    first = {name: choice[name] for name in choice if name not in ("message", "finish_reason")}
    last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    sent = [
        same
        | {"prompt_token_ids": completion["prompt_token_ids"]}
        | {"choices": [first | {"delta": message, "finish_reason": None}]},
    ]
    # A call for each event, as OpenAI has them: some clients read no second one of an event.
    for number, call in enumerate(calls):
        delta = {"tool_calls": [{"index": number} | call]}
        sent.append(same | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    sent.append(same | {"choices": [last]})
    if usage:
        sent.append(same | {"choices": [], "usage": completion["usage"]})
    return sent
