"""Options of a request to an Endpoint, besides its messages.

What changes which tokens the policy draws and can't be had is refused, so that no agent takes one
thing for another. temperature, top_p, seed, penalties and the model's name are the run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.agents.renderer import Message

OLD = ("functions", "function_call")
PLAIN_FORMATS = (None, {"type": "text"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options(max_tokens=64, stop=("Observation:",))"""

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    tools: Sequence[Message] = ()
    reads_calls: bool = True
    """Whether calls in the reply become tool_calls: not without tools, where an agent may look for
    calls in the text itself, and not with tool_choice="none"."""
    log_probs: bool = False
    streams: bool = False
    streams_usage: bool = False


def options_of(body: Mapping[str, Any]) -> Options:
    """The options of a request; a ValueError names the one that can't be had and the fix."""
    if body.get("n") not in (None, 1):
        raise ValueError(f"n={body['n']}: a request has one reply; send it {body['n']} times")
    if body.get("response_format") not in PLAIN_FORMATS:
        raise ValueError(
            "response_format: replies are not held to a form; describe it in a message, and leave "
            "response_format out"
        )
    if body.get("top_logprobs"):
        raise ValueError(
            f"top_logprobs={body['top_logprobs']}: only the drawn tokens' are known; leave it out"
        )
    if body.get("logit_bias"):
        raise ValueError("logit_bias: the policy draws as it is trained; leave it out")
    for name in OLD:
        if body.get(name):
            raise ValueError(f"{name}: an older form; use tools and tool_choice")
    tools = body.get("tools") or ()
    for place, tool in enumerate(tools):
        match tool:
            case {"function": {"name": str()}}:
                continue
        raise ValueError(f"tools[{place}] is no function with a name; give it that form")
    stop = body.get("stop") or ()
    if isinstance(stop, str):
        stop = (stop,)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={stop!r}: give texts that are not empty")
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    for limit in given:
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_tokens={limit!r}: give a whole number of at least 1")
    return Options(
        max_tokens=min(given, default=None),
        stop=tuple(stop),
        tools=tuple(tools),
        reads_calls=bool(tools) and body.get("tool_choice") != "none",
        log_probs=bool(body.get("logprobs")),
        streams=bool(body.get("stream")),
        streams_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )
