"""OpenAI's chat messages: those of a client as the policy reads them, and the policy's as a client
does."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from workers.agents.model import Reply
from workers.agents.renderer import Message
from workers.agents.tool_calls import BEGIN, END, ToolCall, read_calls, without_thoughts


def message_of(reply: Reply, *, most: int | None = None) -> Message:
    """The reply as OpenAI's message: its calls apart from its text, `most` of them; with 0 they are
    text."""
    calls = [call for call in read_calls(reply.text) if not call.mistake][:most]
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
        "function": {
            "name": call.name,
            "arguments": json.dumps(call.arguments, ensure_ascii=False),
        },
    }


def problem_of(messages: Any) -> str:
    """Why a request's messages are none that the policy can read; empty where they are."""
    if not isinstance(messages, list) or not messages:
        return "messages is no list with a message"
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"{where} is no object with a role"
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None):
            return f"{where}.content is no text"
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                return f"{where}.content has a part {kind!r}; the policy reads text alone"
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            return f"{where}.tool_calls is no list"
        for call in calls:
            match call:
                case {"function": {"name": str(), "arguments": str()}}:
                    continue
            return f"{where}.tool_calls has one without a function's name and arguments as text"
    return ""


def comparable(message: Message) -> Message:
    """The parts by which messages are compared: role, text, the calls' names and arguments."""
    calls: list[tuple[str, object]] = []
    for name, arguments in _calls(message):
        # Clients write the same JSON with other spaces.
        try:
            calls.append((name, json.loads(arguments)))
        except ValueError:
            calls.append((name, arguments))
    return {"role": message.get("role"), "text": _text(message.get("content")), "calls": calls}


def for_template(message: Message) -> Message:
    """The message in the words that the policy would have drawn."""
    shown: Message = {"content": _text(message.get("content"))}
    for name, arguments in _calls(message):
        quoted = json.dumps(name, ensure_ascii=False)
        shown["content"] += f'{BEGIN}\n{{"name": {quoted}, "arguments": {arguments}}}\n{END}'
    for name in ("role", "name", "tool_call_id"):
        if name in message:
            shown[name] = message[name]
    return shown


def _text(content: str | Sequence[Message] | None) -> str:
    """A message's text, from a string, parts of text, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _calls(message: Message) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of each call."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append((function["name"], function["arguments"]))
    return calls
