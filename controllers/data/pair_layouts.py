"""Pairs as they are published, brought to a prompt and two answers.

prompt, chosen, rejected                       as they are
chosen and rejected as whole conversations     [user, ..., assistant] (UltraFeedback): the prompt
                                               is what stands before the last message
chosen and rejected as whole dialogues         "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF), without
                                               a prompt's column
"""

from __future__ import annotations

import re
from typing import Any

from controllers.data.config import DataConfig
from controllers.data.messages import MISSING, check_messages, find_value
from controllers.data.sources import SourceRow

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""What begins a turn of a dialogue in HH-RLHF."""
ROLES = {"Human": "user", "Assistant": "assistant"}
ASSISTANT = "\n\nAssistant:"


class Unusable(Exception):
    """A pair that says nothing about which response is better; the message says why."""


def with_prompt(row: SourceRow, config: DataConfig, *, chat: bool) -> SourceRow:
    """The row with the prompt, and one answer in either column; `chat`: there is a chat template,
    so a dialogue becomes messages. Raises Unusable where the two have no common prompt."""
    columns = (config.chosen_column, config.rejected_column)
    values = [find_value(row.values, column) for column in columns]
    if all(isinstance(value, list) and len(value) > 1 for value in values):
        conversations = [check_messages(row, column, "") for column in columns]
    elif find_value(row.values, config.prompt_column) is MISSING and all(map(_is_dialogue, values)):
        conversations = [_turns(value, chat=chat) for value in values]
    else:
        return row
    chosen, rejected = conversations
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("conversations that part before their last turn")
    for messages, column in zip(conversations, columns, strict=True):
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{row.place}: the last message of {column!r} is not the assistant's, so there is "
                "no response to compare; remove the row"
            )
        if not messages[-1]["content"].strip():
            raise Unusable("an empty response")
    prompt: Any = chosen[:-1]
    answers: list[Any] = [[messages[-1]] for messages in conversations]
    if prompt and prompt[0]["role"] == "text":
        prompt, answers = prompt[0]["content"], [answer[0]["content"] for answer in answers]
    changed = dict(zip(columns, answers, strict=True)) | {config.prompt_column: prompt}
    return SourceRow(row.place, row.values | changed)


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and ASSISTANT in value and TURN.match(value) is not None


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
