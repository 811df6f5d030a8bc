"""The text of a response, as a reward function, a judge or a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from workers.text import endings


class ResponseReader:
    """texts = ResponseReader(tokenizer, end_token_ids)(rows)

    Tokens that begin, end or pad a text are left out. Other special tokens, such as a <think> that
    is registered as one, stay in it unless `special_tokens=False`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Iterable[int],
        *,
        special_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.left_out = {*end_token_ids, *(mark for mark in marks if mark is not None)}

    def __call__(self, rows: Iterable[Sequence[int]]) -> list[str]:
        texts = []
        for row in rows:
            ids = [token for token in map(int, row) if token not in self.left_out]
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=not self.special_tokens))
        return texts

    def describe(self) -> str:
        """The tokens that are left out, for the log."""
        ids = self.left_out
        if not self.special_tokens:
            ids = ids | set(endings.special_tokens(self.tokenizer).values())
        return ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(sorted(ids))))
