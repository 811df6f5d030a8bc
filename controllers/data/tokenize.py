"""Tokenises the prompt of a row and checks everything that can be wrong with it.

Text is tokenised with the tokenizer's special tokens (a beginning-of-sequence token where the model
has one); chat messages go through the chat template, with the generation prompt at the end. Leaves
out images and tools: content is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.sources import SourceRow

RESERVED = ("prompt", "response", "finish_reason")
"""Parameters of a reward function that do not come from the dataset's columns."""


class PromptTokenizer:
    """ids = PromptTokenizer(tokenizer, config)(rows)   # one list of ints a row"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.template = _template(config)

    def __call__(self, rows: Sequence[SourceRow]) -> list[list[int]]:
        texts: dict[int, str] = {}
        chats: dict[int, str] = {}
        for i, row in enumerate(rows):
            prompt = self.prompt(row)
            if isinstance(prompt, str):
                texts[i] = prompt
            else:
                chats[i] = self.render(row, prompt)
        ids: list[list[int]] = [[]] * len(rows)
        for rendered, special in ((texts, True), (chats, False)):
            if rendered:
                encoded = self.tokenizer(
                    list(rendered.values()),
                    add_special_tokens=special,
                    padding=False,
                    truncation=False,
                )
                for i, tokens in zip(rendered, encoded["input_ids"], strict=True):
                    ids[i] = tokens
        return ids

    def prompt(self, row: SourceRow) -> str | list[dict[str, Any]]:
        """The checked prompt: text, or messages."""
        column = self.config.prompt_column
        prompt = value_of(row, column, "data.prompt_column")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError(
                    f"{row.place}: {column!r} is empty; remove the row or give it a prompt"
                )
            if self.config.text_as_user_message:
                return [{"role": "user", "content": prompt}]
            return prompt
        messages = check_messages(row, column, what="text or ")
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{row.place}: message {len(messages) - 1} (from 0) of {column!r} is the last one "
                "and the assistant's, so there is nothing to answer; remove it"
            )
        return messages

    def render(self, row: SourceRow, messages: Any, *, generation_prompt: bool = True) -> str:
        """The text that the chat template makes of the messages."""
        if self.template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                f"{row.place}: the prompt is a list of chat messages, but the tokenizer has no "
                "chat template; set data.chat_template to a file with one, use an "
                "instruction-tuned model's tokenizer, or store prompts as text"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.config.chat_template_options,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{row.place}: the chat template rejects the messages ({error}); change one of "
                "the two"
            ) from error
        assert isinstance(text, str)
        return text


def extras(row: SourceRow, config: DataConfig) -> dict[str, Any]:
    """The columns for the reward function: `answer` and the further ones."""
    values = row.values
    selected = {}
    if config.answer_column is not None:
        if values.get(config.answer_column) is None:
            has = "is not among"
            if config.answer_column in values:
                has = "is null in"
            raise ValueError(
                f"{row.place}: the answer's column {config.answer_column!r} {has} "
                f"{', '.join(map(repr, values))}; set data.answer_column to the right column, or "
                "to null if the reward needs no answer"
            )
        selected["answer"] = values[config.answer_column]
    names = config.columns
    if names is None:
        used = (config.prompt_column, config.answer_column)
        names = [name for name in values if name not in used]
    for name in names:
        if name not in values:
            raise ValueError(
                f"{row.place}: no column {name!r}, it has {', '.join(map(repr, values))}; correct "
                "data.columns"
            )
        if name in RESERVED or name in selected:
            raise ValueError(
                f"{row.place}: column {name!r} has the name of something else that the reward "
                "function is given; rename it, or list in data.columns the columns to keep"
            )
        selected[name] = values[name]
    return selected


def value_of(row: SourceRow, column: str, setting: str) -> Any:
    """The row's value, which must be there; `setting` names the column."""
    if column not in row.values:
        raise ValueError(
            f"{row.place}: no column {column!r}, it has {', '.join(map(repr, row.values))}; set "
            f"{setting} to the right column"
        )
    return row.values[column]


def check_messages(row: SourceRow, column: str, what: str = "") -> list[dict[str, Any]]:
    """The checked messages of a column that holds a conversation."""
    messages = value_of(row, column, "data.messages_column")
    if not isinstance(messages, list) or not messages:
        shown = f"{type(messages).__name__} {str(messages)[:60]!r}"
        if messages == []:
            shown = "an empty list"
        raise ValueError(
            f"{row.place}: {column!r} is {shown}; it must be {what}a list of {{role, content}} "
            "messages"
        )
    return [_message(row, column, number, message) for number, message in enumerate(messages)]


def _message(row: SourceRow, column: str, number: int, message: Any) -> dict[str, Any]:
    """The message without the nulls that parquet puts where other messages have a field."""
    place = f"{row.place}: message {number} (from 0) of {column!r}"
    if not isinstance(message, dict):
        raise ValueError(
            f"{place} is a {type(message).__name__}; write {{'role': ..., 'content': ...}}"
        )
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise ValueError(f"{place} has {name}={message.get(name)!r}; it must be text")
    return {name: value for name, value in message.items() if value is not None}


def _template(config: DataConfig) -> str | None:
    if config.chat_template is None:
        return None
    path = Path(config.chat_template).expanduser()
    if not path.is_file():
        raise ValueError(
            f"data.chat_template={config.chat_template!r}: there is no such file; give the path "
            "of a Jinja template"
        )
    return path.read_text(encoding="utf-8")
