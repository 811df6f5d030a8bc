"""Tokenises a conversation, with the mask of the tokens that are learned: the assistant's turns
only.

The conversation is cut where the assistant begins and ends to speak, and the pieces are tokenised
one by one. A prompt has then the very tokens that generation will see (PromptTokenizer), which one
pass over the whole text does not promise. A turn is learned up to its end-of-sequence token: what
the template writes after it (a line break) is never generated. Leaves out templates that rewrite
earlier turns once later ones follow (some drop the thoughts of old turns): there is then no one
text to learn, and the row is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from controllers.data.config import DataConfig
from controllers.data.sources import SourceRow
from controllers.data.tokenize import PromptTokenizer, check_messages


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is learned or not: Segment("4<|end|>", learned=True)."""

    text: str
    learned: bool
    special: bool = False
    """Tokenise with the tokenizer's own special tokens (the beginning of a text without chat
    template)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answered(prompt=[5, 6], response=[7, 1, 5, 8, 1], mask=[1, 1, 0, 1, 1]): the prompt ends
    where the assistant first speaks."""

    prompt: list[int]
    response: list[int]
    mask: list[int]


class ConversationTokenizer:
    """answered = ConversationTokenizer(tokenizer, config).answer(row, prompt, "4")"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.prompts = PromptTokenizer(tokenizer, config)

    def answer(self, row: SourceRow, column: str, response: Any) -> Answered:
        """The prompt of the row (data.prompt_column) with the response of `column`: text, or a
        list of one assistant message."""
        text = _response_text(row, column, response)
        prompt = self.prompts.prompt(row)
        if not isinstance(prompt, str):
            messages = [*prompt, {"role": "assistant", "content": text}]
            return self._of_turns(row, messages, [len(prompt)])
        pieces = [Segment(prompt, learned=False, special=True), Segment(text, learned=True)]
        answered = self._tokens(row, pieces)
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                f"{row.place}: the tokenizer has no end-of-sequence token, so a text response has "
                "no end to learn; use a tokenizer with one, or a chat template "
                "(data.text_as_user_message=true)"
            )
        return Answered(answered.prompt, [*answered.response, int(end)], [*answered.mask, 1])

    def messages(self, row: SourceRow) -> Answered:
        """The conversation of data.messages_column."""
        column = self.config.messages_column
        assert column is not None
        return self.conversation(row, check_messages(row, column))

    def conversation(self, row: SourceRow, messages: Sequence[dict[str, Any]]) -> Answered:
        """Every assistant turn learned; messages after the last one are left out."""
        turns = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        if not turns:
            raise ValueError(
                f"{row.place}: no message has the role 'assistant', so there is nothing to learn; "
                "remove the row"
            )
        return self._of_turns(row, messages, turns)

    def _of_turns(
        self, row: SourceRow, messages: Sequence[dict[str, Any]], turns: Sequence[int]
    ) -> Answered:
        pieces, done = [], ""
        for turn in turns:
            before = self._rendered(row, messages[:turn], done, generation_prompt=True)
            after = self._rendered(row, messages[: turn + 1], before, generation_prompt=False)
            pieces += [
                Segment(before[len(done) :], learned=False),
                Segment(after[len(before) :], learned=True),
            ]
            done = after
        return self._tokens(row, pieces)

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

    def _tokens(self, row: SourceRow, pieces: Sequence[Segment]) -> Answered:
        tokens: list[int] = []
        mask: list[int] = []
        for piece in pieces:
            ids: list[int] = []
            if piece.text:
                ids = self.tokenizer(piece.text, add_special_tokens=piece.special)["input_ids"]
            num_learned = 0
            if piece.learned:
                num_learned = self._until_end(ids)
            if piece.learned and not num_learned:
                raise ValueError(
                    f"{row.place}: an assistant turn has no tokens; remove the row, give it a "
                    "text, or use a chat template that writes it"
                )
            tokens += ids
            mask += [1] * num_learned + [0] * (len(ids) - num_learned)
        first = mask.index(1)
        if not first:
            raise ValueError(
                f"{row.place}: nothing stands before the first assistant turn, and nothing "
                "predicts its first token; add a prompt"
            )
        last = len(mask) - mask[::-1].index(1)
        return Answered(tokens[:first], tokens[first:last], mask[first:last])

    def _until_end(self, ids: Sequence[int]) -> int:
        """The number of tokens up to the last end-of-sequence token; all if there is none."""
        for end in range(len(ids), 0, -1):
            if ids[end - 1] == self.tokenizer.eos_token_id:
                return end
        return len(ids)


def _response_text(row: SourceRow, column: str, response: Any) -> str:
    if (
        isinstance(response, list)
        and len(response) == 1
        and isinstance(response[0], dict)
        and response[0].get("role") == "assistant"
    ):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise ValueError(
            f"{row.place}: {column!r} is {type(response).__name__} {str(response)[:60]!r}; it "
            "must be the response as text, or a list of one {role: assistant, content} message "
            "(the messages before it belong in data.prompt_column)"
        )
    if not response.strip():
        raise ValueError(f"{row.place}: {column!r} is empty; remove the row or give it a response")
    return response
