"""Options of a request to an Endpoint, besides its messages.

What changes which tokens the policy draws and can't be had is refused, so that no agent takes one
thing for another. temperature, top_p, seed, penalties and the model's name are the run's. The log
names, once, a field that is not known and a tool_choice that is not enforced.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.agents.renderer import Message

LOGGER = logging.getLogger(__name__)
READ = {
    *("messages", "n", "stop", "stream", "stream_options", "logprobs", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens", "max_tokens"),
    "modalities",
}
OF_THE_RUN = {
    *("model", "seed", "temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
}
"""How the policy draws is set for the whole run."""
OF_NO_EFFECT = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "priority", "request_id"),
}
OLD = "an older form; use tools and tool_choice"
WORDS = "describe it in a message, and leave it out"
REFUSED = {
    "functions": OLD,
    "function_call": OLD,
    "logit_bias": "the policy draws as it is trained; leave it out",
    "top_logprobs": "only the drawn tokens' are known; leave it out",
    "audio": "the policy writes text alone; leave it out",
    "web_search_options": "give the policy a tool that searches",
    "structured_outputs": f"replies are not held to a form; {WORDS}",
    "chat_template": "the template is data.chat_template; leave it out",
    "chat_template_kwargs": "the template is data.chat_template; leave it out",
    "continue_final_message": "a reply is a turn of its own; leave it out",
    "ignore_eos": "a reply ends where the policy ends it; leave it out",
    "stop_token_ids": "use stop, with texts",
    "bad_words": "the policy draws as it is trained; leave it out",
    "min_tokens": "a reply ends where the policy ends it; leave it out",
}
"""Fields that would change which tokens are drawn, and the fix; null, false, 0 and empty are no
request."""
PLAIN_FORMATS = (None, {"type": "text"})
_told: set[str] = set()
"""The fields of which the log said that they change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options(max_tokens=64, stop=("Observation:",))"""

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    tools: Sequence[Message] = ()
    most_calls: int | None = None
    """Calls of a reply that become tool_calls; 0 without tools, where an agent may look for calls in
    the text itself, and with tool_choice="none"; None: all."""
    log_probs: bool = False
    streams: bool = False
    streams_usage: bool = False


def options_of(body: Mapping[str, Any]) -> Options:
    """The options of a request; a ValueError names the one that can't be had and the fix."""
    if body.get("n") not in (None, 1) or body.get("n") is True:
        raise ValueError(
            f"n={body['n']!r}: a request has one reply; leave n out, and send it as often as replies are "
            "wanted"
        )
    if body.get("response_format") not in PLAIN_FORMATS:
        raise ValueError(
            "response_format: replies are not held to a form; describe it in a message, and leave "
            "response_format out"
        )
    if body.get("modalities") not in (None, [], ["text"]):
        raise ValueError("modalities: the policy writes text alone; leave it out")
    for name, fix in REFUSED.items():
        if body.get(name):
            raise ValueError(f"{name}={str(body[name])[:40]}: {fix}")
    for name in body.keys() - READ - OF_THE_RUN - OF_NO_EFFECT - REFUSED.keys():
        _tell(name, f"the field {name} of a request to an Endpoint is not known, and not read")
    tools = body.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise ValueError("tools is no list; give a list of functions")
    for place, tool in enumerate(tools):
        match tool:
            case {"function": {"name": str()}}:
                continue
        raise ValueError(f"tools[{place}] is no function with a name; give it that form")
    stop = body.get("stop") or ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, list | tuple) or not all(isinstance(end, str) and end for end in stop):
        raise ValueError(f"stop={stop!r}: give texts that are not empty")
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    for limit in given:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"max_tokens={limit!r}: give a whole number of at least 1")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise ValueError(f"stream_options={stream_options!r}: give an object, or leave it out")
    return Options(
        max_tokens=min(given, default=None),
        stop=tuple(stop),
        tools=tuple(tools),
        most_calls=_most_calls(body, tools),
        log_probs=bool(body.get("logprobs")),
        streams=bool(body.get("stream")),
        streams_usage=bool(stream_options.get("include_usage")),
    )


def _most_calls(body: Mapping[str, Any], tools: Sequence[Message]) -> int | None:
    choice = body.get("tool_choice")
    match choice:
        case None | "auto" | "none":
            pass
        case "required" | {"function": {"name": str()}} | {"type": "allowed_tools"}:
            _tell(
                "tool_choice",
                f"tool_choice={choice!r} of a request to an Endpoint is not enforced: the policy may "
                "answer in text, or call another tool",
            )
        case _:
            raise ValueError(
                f"tool_choice={choice!r}: use auto, none, required or a function's name"
            )
    if not tools or choice == "none":
        return 0
    return 1 if body.get("parallel_tool_calls") is False else None


def _tell(name: str, line: str) -> None:
    if name not in _told:
        _told.add(name)
        LOGGER.warning(line)
