"""Pairs as they are published, brought to a prompt and two answers.

prompt, chosen, rejected                       as they are
chosen and rejected as whole conversations     [user, ..., assistant] (UltraFeedback): the prompt
                                               is what stands before the last message
chosen and rejected as whole dialogues         "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF), without
                                               a prompt's column
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from controllers.data.config import DataConfig
from controllers.data.images import without_places
from controllers.data.messages import (
    CONTENTLESS,
    MISSING,
    check_messages,
    find_value,
    text_or_messages,
)
from controllers.data.sources import SourceRow

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""What begins a turn of a dialogue in HH-RLHF."""
HUMAN = re.compile(r"(\n\n)?Human:")
ROLES = {"Human": "user", "Assistant": "assistant"}
ASSISTANT = "\n\nAssistant:"


class Unusable(Exception):
    """A pair that says nothing about which response is better; the message says why."""


def with_prompt(row: SourceRow, config: DataConfig, *, chat: bool) -> SourceRow:
    """The row with the prompt, and one answer in either column; `chat`: there is a chat template,
    so a dialogue becomes messages. Raises Unusable where the two have no common prompt."""
    columns = (config.chosen_column, config.rejected_column)
    values = [text_or_messages(find_value(row.values, column)) for column in columns]
    if all(isinstance(value, list) and len(value) > 1 for value in values):
        conversations = []
        for column, value in zip(columns, values, strict=True):
            messages = check_messages(row, column, "", value=value)
            conversations.append(_behind_the_prompt(row, config, messages))
    elif all(map(_is_dialogue, values)) and _is_whole(row, config, values):
        conversations = [_turns(value, chat=chat) for value in values]
    else:
        return row
    chosen, rejected = conversations
    if without_places(chosen[:-1]) != without_places(rejected[:-1]):
        raise Unusable("conversations that part before their last turn")
    for messages, column in zip(conversations, columns, strict=True):
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{row.place}: the last message of {column!r} is not the assistant's, so there is "
                "no response to compare; remove the row"
            )
        last = messages[-1]
        content = last.get("content")
        if isinstance(content, str) and not content.strip():
            if any(map(last.get, CONTENTLESS)):
                continue
            raise Unusable("an empty response")
    prompt: Any = chosen[:-1]
    if prompt and prompt[-1]["role"] == "assistant":
        raise Unusable("two turns of the assistant at the end")
    answers: list[Any] = [[messages[-1]] for messages in conversations]
    if prompt and prompt[0]["role"] == "text":
        prompt, answers = prompt[0]["content"], [answer[0]["content"] for answer in answers]
    changed = dict(zip(columns, answers, strict=True)) | {config.prompt_column: prompt}
    return replace(row, values=row.values | changed)


def _behind_the_prompt(
    row: SourceRow, config: DataConfig, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The whole conversation: behind the messages of the prompt's column, unless it begins with
    them. Text in that column is what a conversation begins with already (UltraFeedback)."""
    prompt = text_or_messages(find_value(row.values, config.prompt_column))
    if isinstance(prompt, list) and prompt:
        before = check_messages(row, config.prompt_column, "data.prompt_column", value=prompt)
        if without_places(messages[: len(before)]) == without_places(before):
            return messages
        if messages[0]["role"] == "assistant":
            return before + messages
        if before[0]["role"] == "system" and messages[: len(before) - 1] == before[1:]:
            return before[:1] + messages
        raise ValueError(
            f"{row.place}: {config.prompt_column!r} is a conversation with which "
            f"{config.chosen_column!r} or {config.rejected_column!r} does not begin; leave it out, or "
            "store there the assistant's message alone"
        )
    if isinstance(prompt, str) and messages[0]["role"] == "assistant":
        raise ValueError(
            f"{row.place}: {config.prompt_column!r} is text, and the conversations in "
            f"{config.chosen_column!r} and {config.rejected_column!r} go on behind it; store it as a "
            "list of messages"
        )
    return messages


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and ASSISTANT in value and TURN.match(value) is not None


def _is_whole(row: SourceRow, config: DataConfig, dialogues: list[str]) -> bool:
    """Whether the dialogues have the prompt inside: no column has it, or they begin with it. A
    ValueError where another prompt stands before what a person says first."""
    prompt = find_value(row.values, config.prompt_column)
    if prompt is MISSING:
        return True
    if not isinstance(prompt, str) or not all(map(HUMAN.match, dialogues)):
        return False
    if all(dialogue.startswith(prompt.rstrip()) for dialogue in dialogues):
        return True
    raise ValueError(
        f"{row.place}: {config.prompt_column!r} is text with which the dialogues in "
        f"{config.chosen_column!r} and {config.rejected_column!r} do not begin; leave it out, or "
        "store there the last answers alone"
    )


def _turns(dialogue: str, *, chat: bool) -> list[dict[str, Any]]:
    """The dialogue's messages; without a chat template its text up to the last answer, and that."""
    if not chat:
        before, _, answer = dialogue.rpartition(ASSISTANT)
        return [
            {"role": "text", "content": before + ASSISTANT},
            {"role": "assistant", "content": answer},
        ]
    _, *parts = TURN.split(dialogue)
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": ROLES[speaker], "content": text.strip()})
    return messages
