"""Contents: what messages say, apart from what the chat template writes around it.

A content that spells a special token, such as <|im_end|>, stays text: no message of an environment
or a tool can end a turn, or begin one of somebody else's. Leaves out text and token ids that an
episode gives in the place of messages, which are taken as they are.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from workers.agents.outcome import EnvironmentMistake
from workers.text import turn_ending
from workers.text.endings import special_tokens

LOGGER = logging.getLogger(__name__)
CHARACTERS = 8
"""The first look at a text takes so many characters of it for every token that there is space for."""


class Contents:
    """contents = Contents(tokenizer)
    text = template([contents.hidden(message) for message in messages])
    ids = contents.encode(text)      # special tokens are the template's alone
    contents.shown(text)             # the text as it is read

    What a message spells stands in `text` as a mark, which has a random part that no message knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._tokens = special_tokens(tokenizer)
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        ending = turn_ending(tokenizer)
        if ending is not None and ending.token_id is not None:
            text = str(tokenizer.convert_ids_to_tokens(ending.token_id))
            self._tokens[text] = ending.token_id
            ends.add(text)
        self._key = secrets.token_hex(8)
        numbered = dict(zip(self._tokens, range(len(self._tokens)), strict=True))
        self._marks = {text: self._word("m", number) for text, number in numbered.items()}
        self._names = {text: self._word("n", number) for text, number in numbered.items()}
        """Special token -> its name in the renamed tokenizer."""
        self._of_replies = {text: mark for text, mark in self._marks.items() if text in ends}
        """A reply's text has no token that ends it, so one that it spells was not drawn as that
        token; its other special tokens were."""
        self._first = re.compile("|".join({re.escape(text[0]) for text in numbered}) or "(?!)")
        self._lengths = sorted({len(text) for text in numbered}, reverse=True)
        self._tokenizer_by_name: Tokenizer | None = None
        self._has_warned = False

    def hidden(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message, or a tool's schema, with marks in the place of what it spells."""
        marks = self._marks
        if message.get("role") == "assistant":
            marks = self._of_replies
        return {key: self._replaced_in(part, marks) for key, part in message.items()}

    def shown(self, text: str) -> str:
        """The template's text without marks."""
        if self._key not in text:
            return text
        for token, mark in self._marks.items():
            text = text.replace(mark, token)
        return text

    def valid(self, text: str) -> str:
        """The text as tokenizers take it: two halves of a surrogate pair are the character that
        they stand for, one alone is U+FFFD, as where text is decoded. Says so once."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if not self._has_warned:
                self._has_warned = True
                LOGGER.warning(
                    "a text of the environment has %a, half of a surrogate pair; the policy reads "
                    "U+FFFD where its other half is missing, here and in texts after this one",
                    text[error.start],
                )
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of the template's text, in which a mark is the text that it stands for. Of a
        text that surely has over `most` tokens only the first ones, which are over `most`."""
        if most is None:
            return self._encode(text)
        length = CHARACTERS * (most + 1)
        while length < len(text):
            # Twice as many: how a text is cut changes the tokens at the cut alone.
            ids = self._encode(text[:length])
            if len(ids) > 2 * most:
                return ids
            length *= 4
        return self._encode(text)

    def encode_after(self, before: str, text: str, most: int | None = None) -> list[int]:
        """The tokens of `text` behind those of `before`, which ends with a special token."""
        head = self.encode(before)
        if most is not None:
            most += len(head)
        return self.encode(before + text, most)[len(head) :]

    def _encode(self, text: str) -> list[int]:
        if self._key not in text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._tokenizer_by_name is None:
            self._tokenizer_by_name = self._renamed()
        # Not within marks: a special token may be a letter or digit of theirs.
        token_of = {mark: token for token, mark in self._marks.items()}
        parts = re.split(f"({'|'.join(map(re.escape, token_of))})", text)
        named = "".join(token_of.get(part) or self._replaced(part, self._names) for part in parts)
        return list(self._tokenizer_by_name.encode(named, add_special_tokens=False).ids)

    def _word(self, kind: str, number: int) -> str:
        return f"\U00100000{self._key}{kind}{number:06d}\U00100001"

    def _replaced_in(self, value: Any, by: Mapping[str, str]) -> Any:
        """The value with all text in it replaced."""
        match value:
            case str():
                return self._replaced(self.valid(value), by)
            case dict():
                return {key: self._replaced_in(part, by) for key, part in value.items()}
            case list() | tuple():
                return [self._replaced_in(part, by) for part in value]
        return value

    def _replaced(self, text: str, by: Mapping[str, str]) -> str:
        """The longest token first, as tokenizers find them, from left to right."""
        parts, done = [], 0
        for found in self._first.finditer(text):
            start = found.start()
            if start < done:
                continue
            for length in self._lengths:
                token = text[start : start + length]
                if token in by:
                    parts += [text[done:start], by[token]]
                    done = start + length
                    break
        return "".join([*parts, text[done:]])

    def _renamed(self) -> Tokenizer:
        """The same tokenizer with names for special tokens that nobody can spell."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise EnvironmentMistake(
                f"a message of the environment spells a special token, and the tokenizer "
                f"{self.tokenizer.name_or_path} ({type(self.tokenizer).__name__}) can't write one "
                "as text; leave such tokens out of observations, or use a tokenizer that has a "
                "tokenizer.json"
            )
        described = json.loads(backend.to_str())
        described |= {"truncation": None, "padding": None, "post_processor": None}
        for token in described["added_tokens"]:
            token["content"] = self._named(token["content"])
        model = described["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._named(text): id_ for text, id_ in model["vocab"].items()}
        else:
            model["vocab"] = [[self._named(text), score] for text, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._named(model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_one(merge)]
        renamed = Tokenizer.from_str(json.dumps(described))
        # One that is a plain word of the vocabulary would be cut where words are.
        renamed.add_special_tokens(list(self._names.values()))
        for text, name in self._names.items():
            assert renamed.token_to_id(name) == self._tokens[text], f"{text} keeps its id"
        return renamed

    def _named(self, text: str) -> str:
        return self._names.get(text, text)

    def _makes_one(self, merge: str | list[str]) -> bool:
        """Whether a merge of BPE's gives a special token, which plain text never is."""
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not {left, right, left + right}.isdisjoint(self._names)
