"""Demonstrations and answers as tokens, with the mask of the tokens that are learned: the
assistant's turns only.

A conversation is cut where the assistant begins and ends to speak. A prompt has then the very
tokens that generation will see (PromptTokenizer), and the pieces' tokens together decode to the
template's text (workers/text/continuation.py). A turn is learned up to the token that ends it, the
first special one that the template writes after the words (workers/text/endings.py): a line break
behind it is never generated, and what the template writes behind the last turn is no part of the
response. Leaves out templates that rewrite earlier turns once later ones follow (some drop the
thoughts of old turns): there is then no one text to learn, and the row is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.images import has_images, images_of
from controllers.data.messages import MARKS, check_messages, text_or_messages
from controllers.data.sources import SourceRow
from controllers.data.tokenize import PromptTokenizer, check_text
from workers.images import ImageProcessor
from workers.text import Beginning, PieceTokenizer
from workers.text.endings import TurnEnding, turn_ending

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is learned or not: Segment("4<|end|>", learned=True)."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Conversation(place, [Segment("2+2=", False), Segment("4", True)], plain=True,
    ends_open=True): a prompt, and turns by turns what is learned and what is not."""

    place: str
    segments: list[Segment]
    plain: bool
    """Without chat template: the tokenizer's own beginning stands before it."""
    ends_open: bool
    """No token ends the last turn yet."""
    images: Sequence[dict[str, str]] = ()
    """References to the images of all turns, in order."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answered(prompt=[5, 6], response=[7, 1, 5, 8, 1], mask=[1, 1, 0, 1, 1]): the prompt ends
    where the assistant first speaks."""

    prompt: list[int]
    response: list[int]
    mask: list[int]
    images: Sequence[dict[str, str]] = ()


class ConversationTokenizer:
    """tokenize = ConversationTokenizer(tokenizer, config)
    answered = tokenize([tokenize.answer(row, "response", "4"), tokenize.messages(other_row)])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        images: ImageProcessor | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.prompts = PromptTokenizer(tokenizer, config, images)
        self.pieces = PieceTokenizer(tokenizer)
        self.beginning = Beginning(tokenizer)
        self.ending = turn_ending(tokenizer, chat_template=self.prompts.template_for())
        """What the template writes after an assistant's words."""
        self.warned = self.repeated = False
        self.end_text = ""
        if self.ending is not None and self.ending.token_id is not None:
            self.end_text = str(tokenizer.convert_ids_to_tokens(self.ending.token_id))

    @property
    def has_template(self) -> bool:
        """Whether messages can be tokenised."""
        return self.prompts.template_for() is not None

    def answer(self, row: SourceRow, column: str, response: Any) -> Conversation:
        """The prompt of the row (data.prompt_column) with the response of `column`: text, or a
        list of one assistant message, also as JSON text."""
        response = text_or_messages(response)
        message = _response_message(row, column, response)
        prompt = self.prompts.prompt(row)
        if not isinstance(prompt, str):
            return self._of_turns(row, [*prompt, message], [len(prompt)])
        text = _text_of(row, column, message)
        if not self.repeated and text.startswith(prompt):
            self.repeated = True
            LOGGER.warning(
                "%s: %r begins with the prompt, so it stands there twice; store in it what goes on "
                "behind the prompt",
                row.place,
                column,
            )
        segments = [Segment(prompt, learned=False), Segment(text, learned=True)]
        return Conversation(row.place, segments, plain=True, ends_open=True)

    def messages(self, row: SourceRow) -> Conversation:
        """The conversation of data.messages_column."""
        column = self.config.messages_column
        assert column is not None
        messages = check_messages(row, column, "data.messages_column")
        return self.conversation(row, self.prompts.placed(row, messages))

    def conversation(self, row: SourceRow, messages: Sequence[dict[str, Any]]) -> Conversation:
        """Every assistant turn learned but those of weight 0; messages after the last one are left
        out."""
        turns = [number for number, message in enumerate(messages) if is_learned(row, message)]
        if not turns:
            if any(message["role"] == "assistant" for message in messages):
                raise ValueError(
                    f"{row.place}: every assistant's message has the weight 0, so there is nothing "
                    "to learn; remove the row"
                )
            roles = ", ".join(sorted({repr(message["role"]) for message in messages}))
            raise ValueError(
                f"{row.place}: no message has the role 'assistant' (the roles are {roles}), so there is "
                "nothing to learn; remove the row or rename the role"
            )
        return self._of_turns(row, messages, turns)

    def __call__(self, conversations: Sequence[Conversation]) -> list[Answered]:
        """The tokens of each, all of them at once."""
        texts = [[piece.text for piece in one.segments] for one in conversations]
        answered = []
        for conversation, ids in zip(conversations, self.pieces(texts), strict=True):
            answered.append(self._joined(conversation, ids))
        return answered

    def _of_turns(
        self, row: SourceRow, messages: Sequence[dict[str, Any]], turns: Sequence[int]
    ) -> Conversation:
        if turns[0] == 0:
            raise ValueError(
                f"{row.place}: message 0 (from 0) is the assistant's, and nothing stands before "
                "it that it answers; put a user's or a system message before it"
            )
        for turn in turns:
            check_written(f"{row.place}: message {turn} (from 0)", messages[turn])
        segments, done, ends_open = [], "", False
        for turn in turns:
            answer = self._without_end(messages[turn])
            shown = [*messages[:turn], answer]
            before = self._rendered(row, messages[:turn], done, generation_prompt=True)
            after = self._rendered(row, shown, before, generation_prompt=False)
            ending = self._ending(row, shown, after)
            if not after[len(before) : len(after) - len(ending.text)].strip():
                raise ValueError(
                    f"{row.place}: message {turn} (from 0) is the assistant's, and the chat template "
                    "writes nothing of it; remove it or the row, mark it with weight: 0, or use a "
                    "template that writes it"
                )
            end = len(after) - len(ending.text) + ending.end
            segments.append(Segment(before[len(done) :], learned=False))
            segments.append(Segment(after[len(before) : end], learned=True))
            done, ends_open = after[:end], ending.token_id is None
        images = images_of(messages[: turns[-1] + 1])
        return Conversation(row.place, segments, plain=False, ends_open=ends_open, images=images)

    def _without_end(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose text already spells the end of its turn, without it: the template
        writes it."""
        content = message.get("content")
        if not self.end_text or not isinstance(content, str):
            return message
        while content.rstrip().endswith(self.end_text):
            content = content.rstrip().removesuffix(self.end_text)
        return {**message, "content": content} if content != message["content"] else message

    def _ending(self, row: SourceRow, messages: Sequence[dict[str, Any]], text: str) -> TurnEnding:
        """What ends the last of the messages, whose text is `text`."""
        if self.ending is not None and self.ending.text and text.endswith(self.ending.text):
            return self.ending
        ending = turn_ending(self.tokenizer, messages[:-1], **self.prompts.template_arguments(row))
        if ending is None or not text.endswith(ending.text):
            return TurnEnding("", 0, None)
        return ending

    def _rendered(
        self,
        row: SourceRow,
        messages: Sequence[dict[str, Any]],
        begin: str,
        *,
        generation_prompt: bool,
    ) -> str:
        """The template's text, which must go on from what it made of fewer messages."""
        text = self.prompts.render(row, list(messages), generation_prompt=generation_prompt)
        if not text.startswith(begin):
            raise ValueError(
                f"{row.place}: the chat template writes the first messages differently once "
                f"message {len(messages) - 1} (from 0) follows, so no one text has all turns; "
                "give data.chat_template a template that keeps earlier turns as they are, or "
                "store one row for each assistant turn"
            )
        return text

    def _joined(self, conversation: Conversation, pieces: Sequence[list[int]]) -> Answered:
        place = conversation.place
        tokens: list[int] = []
        mask: list[int] = []
        for segment, ids in zip(conversation.segments, pieces, strict=True):
            if segment.learned and not ids:
                raise ValueError(
                    f"{place}: an assistant turn has no tokens; remove the row, give it a "
                    "text, or use a chat template that writes it"
                )
            tokens += ids
            mask += [int(segment.learned)] * len(ids)
        first = len(pieces[0])
        prompt = tokens[:first]
        if conversation.plain:
            prompt = self.beginning.before(prompt)
        if not prompt:
            raise ValueError(
                f"{place}: nothing stands before the first assistant turn, and nothing "
                "predicts its first token; add a prompt"
            )
        response, mask = tokens[first:], mask[first:]
        if conversation.ends_open:
            end = self._end(place, plain=conversation.plain)
            while len(response) > 1 and response[-2:] == [end, end]:
                response.pop()
                mask.pop()
            if response[-1] != end:
                response.append(end)
                mask.append(1)
        return Answered(prompt, response, mask, conversation.images)

    def _end(self, place: str, *, plain: bool) -> int:
        """The token that ends a response that nothing ends yet."""
        end = self.tokenizer.eos_token_id
        if end is None and plain:
            raise ValueError(
                f"{place}: the tokenizer has no end-of-sequence token, so a text response has "
                "no end to learn; use a tokenizer with one, or a chat template "
                "(data.text_as_user_message=true)"
            )
        if not plain and not self.warned:
            self.warned = True
            LOGGER.warning(
                "the chat template writes no token that ends an assistant's turn (%s, say); the "
                "tokenizer's end-of-sequence token is learned after the last one",
                place,
            )
        if end is None:
            raise ValueError(
                f"{place}: neither the chat template nor the tokenizer has a token that ends an "
                "assistant's turn, so it has no end to learn; give data.chat_template a template "
                "that writes one"
            )
        return int(end)


def is_learned(row: SourceRow, message: dict[str, Any]) -> bool:
    """Whether it is the assistant's and no mark says that it is not to be learned."""
    if message["role"] != "assistant":
        return False
    for name in MARKS:
        weight = message.get(name, 1)
        if isinstance(weight, str) or weight not in (0, 1):
            raise ValueError(
                f"{row.place}: an assistant's message has {name}={weight!r}; it is learned (1, or no "
                f"{name}) or not (0)"
            )
    return all(message.get(name, 1) for name in MARKS)


def _response_message(row: SourceRow, column: str, response: Any) -> dict[str, Any]:
    """The assistant's message that the column holds, as text or as a list of that message."""
    if isinstance(response, list) and len(response) == 1:
        message = check_messages(row, column, "data.response_column", value=response)[0]
        if message["role"] == "assistant":
            _text_of(row, column, message)
            return message
    if not isinstance(response, str):
        raise ValueError(
            f"{row.place}: {column!r} is {type(response).__name__} {str(response)[:60]!r}; it "
            "must be the response as text, or a list of one {role: assistant, content} message "
            "(the messages before it belong in data.prompt_column)"
        )
    message = {"role": "assistant", "content": response}
    _text_of(row, column, message)
    return message


def check_written(place: str, message: Mapping[str, Any]) -> None:
    """A ValueError for a turn to learn that has an image."""
    if has_images([message]):
        raise ValueError(
            f"{place} is an assistant's turn with an image, and a model writes text alone; remove the image"
        )


def _text_of(row: SourceRow, column: str, message: dict[str, Any]) -> str:
    check_written(f"{row.place}: {column!r}", message)
    text = message.get("content") or ""
    if not text.strip() and not message.get("tool_calls"):
        raise ValueError(f"{row.place}: {column!r} is empty; remove the row or give it a response")
    return check_text(row, column, text)
