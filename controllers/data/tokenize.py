"""Tokenises the prompt of a row and checks everything that can be wrong with it.

Text is tokenised after the tokenizer's own beginning (a beginning-of-sequence token where the model
has one, once); chat messages go through the chat template, with the generation prompt at the end.
Images become as many tokens as they have, where the model sees them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.image_column import (
    check_all_read,
    column_images,
    every_column,
    image_columns,
    is_usual,
    looks_like_images,
)
from controllers.data.images import has_images, images_of, reference_of, with_column_images
from controllers.data.messages import (
    MARKS,
    MISSING,
    check_encodable,
    check_messages,
    check_no_messages,
    find_value,
    is_null,
    text_or_messages,
    tools_of,
    value_of,
)
from controllers.data.sources import SourceRow
from workers.images import ImageProcessor
from workers.images.families import FAMILIES
from workers.text import Beginning, bake_options, dated
from workers.text.endings import TEMPLATE_ERRORS

LOGGER = logging.getLogger(__name__)

RESERVED = ("prompt", "response", "finish_reason")
"""Parameters of a reward function that do not come from the dataset's columns."""

BLIND = f"the model sees none; use one of {', '.join(FAMILIES)}"
"""Why images are refused, and what to do."""

GROUND_TRUTH = "reward_model.ground_truth"
"""The answer in verl's rows, which is read where the data has no column `answer`."""


class PromptTokenizer:
    """ids = PromptTokenizer(tokenizer, config)(rows)   # one list of ints a row"""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
        blind: str = BLIND,
    ) -> None:
        """`images`: of a model that sees them. `blind`: why images are refused where there is none, and
        what to do."""
        self.tokenizer, self.config, self.images, self.blind = tokenizer, config, images, blind
        self.template = dated(settled_template(tokenizer, config), config.date)
        self.beginning = Beginning(tokenizer)
        self.tools_checked = False
        self.fields_checked: set[str] = {"role", "content", *MARKS}
        self.roles_checked: set[str] = set()

    def __call__(self, rows: Sequence[SourceRow]) -> list[list[int]]:
        return self.tokens(rows, [self.prompt(row) for row in rows])

    def tokens(
        self, rows: Sequence[SourceRow], prompts: Sequence[str | list[dict[str, Any]]]
    ) -> list[list[int]]:
        """Those of the checked prompts of rows."""
        texts, plain = [], []
        for row, prompt in zip(rows, prompts, strict=True):
            plain.append(isinstance(prompt, str))
            texts.append(prompt if isinstance(prompt, str) else self.render(row, prompt))
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
        ids = []
        for is_plain, tokens in zip(plain, encoded["input_ids"], strict=True):
            ids.append(self.beginning.before(tokens) if is_plain else tokens)
        return ids

    def prompt(self, row: SourceRow) -> str | list[dict[str, Any]]:
        """The checked prompt: text, or messages."""
        column = self.config.prompt_column
        prompt = text_or_messages(value_of(row, column, "data.prompt_column"))
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError(
                    f"{row.place}: {column!r} is empty; remove the row or give it a prompt"
                )
            check_text(row, column, prompt)
            if self.config.text_as_user_message:
                return self.placed(row, [{"role": "user", "content": prompt}])
            self._check_text_alone(row)
            if not self.tools_checked and tools_of(row, self.config.tools_column):
                self.tools_checked = True
                LOGGER.warning(
                    "%s: the prompt is text, which no chat template gives the tools in column %r; store "
                    "prompts as messages, or set data.text_as_user_message=true",
                    row.place,
                    self.config.tools_column,
                )
            return prompt
        messages = check_messages(row, column, "data.prompt_column", what="text or ", value=prompt)
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{row.place}: message {len(messages) - 1} (from 0) of {column!r} is the last one "
                "and the assistant's, so there is nothing to answer; remove it"
            )
        return self.placed(row, messages)

    def _check_text_alone(self, row: SourceRow) -> None:
        """A ValueError where a prompt that is text has images in a column."""
        if self.images is None:
            self._check_unseen(row)
        elif (images := column_images(row, self.config)).values:
            raise ValueError(
                f"{row.place}: {self.config.prompt_column!r} is text, and the row has images in "
                f"{images.name!r}; store prompts as messages, or set data.text_as_user_message=true"
            )
        else:
            text = str(value_of(row, self.config.prompt_column, "data.prompt_column"))
            check_all_read(row, self.config, [{"role": "user", "content": text}])

    def _check_unseen(self, row: SourceRow) -> None:
        """A ValueError where a column has images for a model that sees none."""
        for images in every_column(row, self.config):
            if looks_like_images(images, self.config):
                raise ValueError(
                    f"{row.place}: {images.name!r} has images, and {self.blind}, or set "
                    "data.images_column=null to leave them out"
                )

    def placed(self, row: SourceRow, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the images of their column. A ValueError for images that the model does
        not see."""
        if self.images is not None:
            column = column_images(row, self.config)
            check_all_read(row, self.config, messages)
            return with_column_images(row, messages, column, usual=is_usual(self.config))
        if has_images(messages):
            raise ValueError(f"{row.place}: a message has an image, and {self.blind}")
        self._check_unseen(row)
        return messages

    def template_arguments(self, row: SourceRow) -> dict[str, Any]:
        """The arguments of apply_chat_template besides the messages."""
        tools = tools_of(row, self.config.tools_column)
        return {"chat_template": self.template_for(tools), "tools": tools}

    def template_for(self, tools: object = None) -> str | None:
        """The template; of several by name the one that transformers would take."""
        template = self.template
        if isinstance(template, dict):
            template = template.get("default")
            if tools and "tool_use" in self.template:
                template = self.template["tool_use"]
        return None if template is None else str(template)

    def render(self, row: SourceRow, messages: Any, *, generation_prompt: bool = True) -> str:
        """The text that the chat template makes of the messages."""
        if self.template_for() is None:
            if isinstance(self.template, dict):
                raise ValueError(
                    f"{row.place}: the prompt is a list of chat messages, and the tokenizer's chat "
                    f"templates are {', '.join(sorted(self.template))}, none of them default; set "
                    "data.chat_template to a file with one of them"
                )
            raise ValueError(
                f"{row.place}: the prompt is a list of chat messages, but the tokenizer has no "
                "chat template; set data.chat_template to a file with one, use an "
                "instruction-tuned model's tokenizer, or store prompts as text"
            )
        arguments = self.template_arguments(row)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **arguments,
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"{row.place}: the chat template rejects the messages ({_line(error)}); change one "
                "of the two"
            ) from error
        assert isinstance(text, str)
        check_encodable(f"{row.place}: the chat template's text", text)
        self._check_fields(row, messages, text, generation_prompt)
        if self.images is not None:
            text = self._with_images(row, messages, text)
        if not self.tools_checked:
            self._check_tools(row, messages, text, generation_prompt)
        return text

    def _with_images(self, row: SourceRow, messages: Any, text: str) -> str:
        """The template's text with the tokens of the images."""
        assert self.images is not None
        references = [reference_of(stored, row.place) for stored in images_of(messages)]
        try:
            return self.images.expand(text, references)
        except ValueError as error:
            problem = str(error)
            if not problem.startswith(row.place):  # an image names its place itself
                problem = f"{row.place}: {problem}"
            raise ValueError(problem) from error

    def _check_fields(
        self, row: SourceRow, messages: Any, text: str, generation_prompt: bool
    ) -> None:
        """Says so, once for a name, where the template writes the messages as if they had no such
        entry (reasoning_content, say), or leaves out what a role says."""
        unseen = [
            message
            for message in messages
            if message["role"] not in self.roles_checked
            or not message.keys() <= self.fields_checked
        ]
        for message in unseen:
            role, content = message["role"], message.get("content")
            if role in self.roles_checked or not isinstance(content, str) or not content.strip():
                continue
            self.roles_checked.add(role)
            if content.strip() not in text:
                LOGGER.warning(
                    "%s: the chat template does not write the content of a message of the role %r as it "
                    "stands; look at what it writes, or set data.chat_template",
                    row.place,
                    role,
                )
        names = set().union(*unseen) - self.fields_checked
        for name in sorted(names):
            self.fields_checked.add(name)
            others = [{key: message[key] for key in message if key != name} for message in messages]
            try:
                without = self.tokenizer.apply_chat_template(
                    others,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.template_arguments(row),
                )
            except TEMPLATE_ERRORS:  # it is read
                continue
            if without == text:
                LOGGER.warning(
                    "%s: the chat template does not write %r of the messages; set data.chat_template "
                    "to one that does, or put it into the content",
                    row.place,
                    name,
                )

    def _check_tools(
        self, row: SourceRow, messages: Any, text: str, generation_prompt: bool
    ) -> None:
        """Says so, once, where the template does not read the tools that it is given."""
        if not tools_of(row, self.config.tools_column):
            return
        self.tools_checked = True
        without = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=self.template_for(),
        )
        if without == text:
            LOGGER.warning(
                "%s: the chat template does not read the tools in column %r; set data.chat_template "
                "to one that does, or data.tools_column=null",
                row.place,
                self.config.tools_column,
            )


def check_text(row: SourceRow, column: str, text: str) -> str:
    """The text, which a tokenizer must be able to take, and which is no list of messages in another
    form."""
    check_no_messages(row, column, text)
    check_encodable(f"{row.place}: {column!r}", text)
    return text


def extras(row: SourceRow, config: DataConfig, *, sees_images: bool = False) -> dict[str, Any]:
    """The columns for the reward function: `answer` and the further ones, without the images of a
    model that sees them."""
    values = row.values
    selected = {}
    if config.answer_column is not None:
        answer = find_value(values, config.answer_column)
        if answer is MISSING and config.answer_column == "answer":
            answer = find_value(values, GROUND_TRUTH)
        if answer is MISSING or is_null(answer):
            has = "is null in"
            if answer is MISSING:
                has = "is not among"
            raise ValueError(
                f"{row.place}: the answer's column {config.answer_column!r} {has} "
                f"{', '.join(map(repr, values))}; set data.answer_column to the right column, or "
                "to null if the reward needs no answer"
            )
        selected["answer"] = answer
    names = config.columns
    if names is None:
        used = [config.prompt_column, config.answer_column]
        if sees_images:
            used += image_columns(config)
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


def settled_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Any:
    """The chat template (or several by name) that data.chat_template and
    data.chat_template_options come to, with the options inside it; the tokenizer's own where they
    say nothing, None where it has none."""
    template = tokenizer.chat_template
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        if not path.is_file():
            raise ValueError(
                f"data.chat_template={config.chat_template!r}: there is no such file; give the "
                "path of a Jinja template"
            )
        template = path.read_text(encoding="utf-8")
    if template is None and config.chat_template_options:
        raise ValueError(
            f"data.chat_template_options is {config.chat_template_options}, which nothing reads without a "
            "chat template, and the tokenizer has none; set data.chat_template, or leave it out"
        )
    return bake_options(template, config.chat_template_options)


def _line(error: Exception) -> str:
    """The error as one line, with its kind where the message says little."""
    text = " ".join(str(error).split())
    return (
        text if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {text}"
    )
