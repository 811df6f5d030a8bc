"""The content of a message as the chat template takes it: its text, or one part with all of it.

Several parts of text are one text, in which a special token may come about that none of them has.
Leaves out images and other parts: what an environment says is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from workers.agents.outcome import EnvironmentMistake
from workers.text.endings import SENTINEL, TEMPLATE_ERRORS


def joined(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its parts of text as one text; an EnvironmentMistake for any other part.

    joined({"role": "user", "content": [{"type": "text", "text": "a"}]})
        == {"role": "user", "content": "a"}
    """
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = []
    for part in content:
        match part:
            case str() as text:
                texts.append(text)
            case {"text": str() as text}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise EnvironmentMistake(
                    f"a message of role {message.get('role')} has a part of type {kind!r}, and what "
                    "an environment says is text; describe it in words (images are for prompts of "
                    "runs without an environment)"
                )
    return {**message, "content": "".join(texts)}


def wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes parts of text, and no plain text."""
    if tokenizer.chat_template is None:
        return False
    shown = []
    for content in (SENTINEL, [{"type": "text", "text": SENTINEL}]):
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        except TEMPLATE_ERRORS:
            text = ""
        shown.append(SENTINEL in str(text))
    return shown == [False, True]
