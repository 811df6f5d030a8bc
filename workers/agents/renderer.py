"""Renderer: messages as tokens, each message once. What follows a reply of the policy is encoded
alone; nothing that stands in the transcript is ever tokenised again. Special tokens are the
template's alone, whatever a message spells (contents.py).

The chat template must be one that only adds: check() extends canned conversations by messages of a
user and of a tool, with and without thoughts, and says where the template writes what came before
differently.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from workers.agents.contents import Contents
from workers.agents.outcome import EnvironmentMistake
from workers.agents.parts import joined, wants_parts
from workers.text import Beginning, PieceTokenizer
from workers.text.endings import SENTINEL, TEMPLATE_ERRORS, TurnEnding, ending_of

Message = dict[str, Any]
"""{"role": "user", "content": "..."}"""

QUESTION: Message = {"role": "user", "content": "How much is 2 + 2?"}
FURTHER: dict[str, Message] = {
    "user": {"role": "user", "content": "And 3 + 3?"},
    "tool": {"role": "tool", "name": "add", "content": "4"},
}
"""Role -> a message of it that follows a reply."""
REPLIES = {
    "user": "It is 4.",
    "tool": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>',
}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
END_OF_THOUGHT = "</think>"
MOST_SETS = 64
"""The most sets of tools whose renderers are kept."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that follows a reply: `text` behind the token that ends the turn, `end` what the
    template writes of the end where no token does."""

    text: str
    end: str


class Renderer:
    """renderer = Renderer(tokenizer, tools=schemas)
    ids = renderer.start(messages)                          # with the generation prompt
    ids += renderer.extend([*messages, reply], [further])   # what follows the reply
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Message] | None = None
    ) -> None:
        self.tokenizer, self.tools = tokenizer, list(tools or ()) or None
        self._pieces, self._contents = PieceTokenizer(tokenizer), Contents(tokenizer)
        self._wants_parts = wants_parts(tokenizer)
        self._verdicts: dict[tuple[str, bool], str] = {}
        self._written: set[tuple[bool, tuple[str, ...]]] = set()
        """Roles, at the beginning or behind a reply, of which the template writes all."""
        self._developer: str | None = None
        self._with_tools: OrderedDict[str, Renderer] = OrderedDict()

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def with_tools(self, tools: Sequence[Message]) -> Renderer:
        """The renderer of these tools in place of its own; the same one every time, for the last
        MOST_SETS sets of them."""
        key = json.dumps(list(tools))
        if key not in self._with_tools:
            renderer = Renderer(self.tokenizer, tools)
            renderer._contents = self._contents  # a second tokenizer of it may take seconds to make
            self._with_tools[key] = renderer
        self._with_tools.move_to_end(key)
        if len(self._with_tools) > MOST_SETS:
            self._with_tools.popitem(last=False)
        return self._with_tools[key]

    def start(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """The tokens of a conversation that the policy goes on with. Of one that surely has over
        `most` tokens only the first ones, which are over `most`: a page of megabytes takes seconds
        to encode, in which no other episode goes on."""
        self._check_written([], messages)
        return self._contents.encode(self._rendered(messages), most)

    def text(self, text: str) -> list[int]:
        """The tokens of plain text at the beginning of a transcript."""
        valid = self._contents.valid(text)
        ids = list(self.tokenizer(valid, add_special_tokens=False)["input_ids"])
        return Beginning(self.tokenizer).before(ids)

    def further_text(self, before: str, text: str) -> list[int]:
        """The tokens of plain text that follows `before`."""
        return self._pieces([[before, self._contents.valid(text)]])[0][1]

    def extend(
        self,
        history: Sequence[Message],
        new: Sequence[Message],
        *,
        closed: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """The tokens that follow a reply, which is the last message of `history`. `closed`:
        whether the reply ends with a token that ends turns; else the template's is added. `most`:
        see start."""
        self._check_written([QUESTION, {"role": "assistant", "content": REPLIES["tool"]}], new)
        ending, piece = self._following(history, new)
        if ending.token_id is None:
            text = piece.text
            if not closed:
                text = piece.end + text
            return self._contents.encode(text, most)
        ids = self._contents.encode_after(piece.end, piece.text, most)
        if closed:
            return ids
        return [ending.token_id, *ids]

    def check(self, role: str, *, thoughts: bool) -> str:
        """Why a conversation with thoughts (or without) can't be extended by messages of `role`;
        empty where it can."""
        key = (role, thoughts)
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(role, THOUGHT if thoughts else "")
        return self._verdicts[key]

    def render(self, messages: Sequence[Message]) -> str:
        """The template's text; an EnvironmentMistake where it rejects the messages."""
        return self._contents.shown(self._rendered(messages))

    def _rendered(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The same, with marks where messages spell special tokens."""
        if not self.has_template:
            raise EnvironmentMistake(
                "the environment speaks in chat messages, but the tokenizer has no chat template; "
                "set data.chat_template to a file with one, or let the environment speak in text "
                "or token ids"
            )
        shown = [self._for_template(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                shown,
                tools=self.tools and [self._contents.hidden(tool) for tool in self.tools],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise EnvironmentMistake(
                f"the chat template of {self.tokenizer.name_or_path} rejects the messages with "
                f"roles {', '.join(str(message.get('role')) for message in messages)} "
                f"({type(error).__name__}: {reason}); change one of the two"
            ) from error
        assert isinstance(text, str)
        return text

    def _check_written(self, before: Sequence[Message], messages: Sequence[Message]) -> None:
        """An EnvironmentMistake where the template leaves out a message for its role."""
        key = (bool(before), tuple(str(message.get("role")) for message in messages))
        if key in self._written:
            return
        words = {place: f"{SENTINEL}{place}{SENTINEL}" for place in range(len(messages))}
        shown = [{**message, "content": words[place]} for place, message in enumerate(messages)]
        try:
            text = self.render([*before, *shown])
        except EnvironmentMistake:
            return  # the messages themselves tell
        for place, role in enumerate(key[1]):
            if words[place] not in text:
                raise EnvironmentMistake(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out a message of "
                    f"role {role!r} at that place, so the policy would not read it; give it a role "
                    "that the template writes (user, say), or set data.chat_template to one that "
                    f"writes {role!r}"
                )
        self._written.add(key)

    def _role(self, role: Any) -> Any:
        """The role as the template knows it: a developer, OpenAI's newer name of the system, is
        the system where the template has no developer."""
        if role != "developer":
            return role
        if self._developer is None:
            self._developer = "developer"  # in what is tried
            if not self._writes("developer") and self._writes("system"):
                self._developer = "system"
        return self._developer

    def _writes(self, role: str) -> bool:
        """Whether the template writes a first message of that role."""
        try:
            return SENTINEL in self.render([{"role": role, "content": SENTINEL}, QUESTION])
        except EnvironmentMistake:
            return False

    def _for_template(self, message: Message) -> Message:
        shown = self._contents.hidden(joined(message))
        if "role" in shown:
            shown["role"] = self._role(message["role"])
        if self._wants_parts and isinstance(shown.get("content"), str):
            shown["content"] = [{"type": "text", "text": shown["content"]}]
        return shown

    def _following(
        self, history: Sequence[Message], new: Sequence[Message]
    ) -> tuple[TurnEnding, Piece]:
        """The end of the turn, and the further text, that the template writes behind the words of
        the last message of `history`."""
        words = SENTINEL
        while words in str(new):
            words += "q"
        shown = [*history[:-1], {"role": "assistant", "content": words}]
        # As the rendered text has them: a tokenizer's special token may be a plain "1".
        words = self._contents.hidden(shown[-1])["content"]
        _, found, tail = self._rendered([*shown, *new]).rpartition(words)
        if not found:
            raise EnvironmentMistake(
                f"the chat template of {self.tokenizer.name_or_path} leaves out the reply before "
                f"{new[0]}; give data.chat_template a template that keeps it"
            )
        alone = self._rendered(shown, generation_prompt=False).rpartition(words)[2]
        ending = ending_of(self.tokenizer, alone)
        if ending.token_id is not None:
            # The first special token behind the words, whatever follows it.
            ending = ending_of(self.tokenizer, tail)
            return ending, Piece(tail[ending.end :], tail[: ending.end])
        end = alone
        while end and not tail.startswith(end):
            end = end[:-1]
        return TurnEnding(end, len(end), None), Piece(tail[len(end) :], end)

    def _verdict(self, role: str, thought: str) -> str:
        """Extends a conversation twice, and compares with the template's text of all of it."""
        reply = thought + REPLIES[role]
        history = [QUESTION]
        try:
            text = self.render(history)
            self._check_written(
                [QUESTION, {"role": "assistant", "content": reply}], [FURTHER[role]]
            )
            for _ in range(2):
                history.append({"role": "assistant", "content": reply})
                _, piece = self._following(history, [FURTHER[role]])
                text += reply + piece.end + piece.text
                history.append(FURTHER[role])
                whole = self.render(history)
                if whole != text:
                    return self._difference(whole, text, role)
        except EnvironmentMistake as error:
            return str(error)
        return ""

    def _difference(self, whole: str, text: str, role: str) -> str:
        place = 0
        while place < min(len(whole), len(text)) and whole[place] == text[place]:
            place += 1
        return (
            f"the chat template of {self.tokenizer.name_or_path} writes earlier turns differently "
            f"once a message of role {role} follows: at character {place} it has "
            f"{whole[place : place + 40]!r}, where the policy was shown, or drew, "
            f"{text[place : place + 40]!r}; give data.chat_template a template that keeps earlier "
            "turns, or set episode.history=as_drawn to keep them as they were drawn"
        )
