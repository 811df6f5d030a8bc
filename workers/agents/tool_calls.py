"""Reading the calls of tools out of a reply.

The form is Hermes', which Qwen and most templates with tools use: <tool_call>{"name": ...,
"arguments": {...}}</tool_call>; a reply that is nothing but such an object (Llama's form, with
"parameters") counts too. A call inside of thoughts is none. Leaves out Mistral's and DeepSeek's
forms.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from workers.agents.renderer import END_OF_THOUGHT

BEGIN, END = "<tool_call>", "</tool_call>"
THOUGHT = "<think>"
ARGUMENTS = re.compile(r'"(arguments|parameters)"\s*:')


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """ToolCall(name="add", arguments={"a": 1, "b": 2})"""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    mistake: str = ""
    """Why it can't be carried out, in words for the policy."""


def read_calls(text: str) -> list[ToolCall]:
    """The calls in the order of the text; none where it is an answer."""
    spoken = without_thoughts(text)
    if BEGIN not in spoken:
        bare = spoken.strip()
        if not bare.startswith("{") or not ARGUMENTS.search(bare):
            return []  # an answer, which may be an object with a name
        call = _call(bare)
        return [] if call.mistake else [call]
    calls = []
    for part in spoken.split(BEGIN)[1:]:
        body, end, _ = part.partition(END)
        if not end:
            calls.append(ToolCall(mistake=f"the call has no {END}"))
            continue
        calls.append(_call(body))
    return calls


def without_thoughts(text: str) -> str:
    """The text behind the thoughts; before them, where they have no end."""
    if END_OF_THOUGHT in text:
        return text.rpartition(END_OF_THOUGHT)[2]
    return text.partition(THOUGHT)[0]


def _call(body: str) -> ToolCall:
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ToolCall(mistake="the call is no valid text: it has half of a surrogate pair")
    except RecursionError:
        return ToolCall(mistake="the call is nested too deeply")
    except ValueError as error:
        return ToolCall(mistake=f"the call is not valid JSON ({error})")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall(mistake='the call is no object with a "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as text
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return ToolCall(name=value["name"], mistake="the arguments are no object")
    return ToolCall(name=value["name"], arguments=arguments)
