"""Tokens of a text that comes in pieces (a prompt, its response, the turns that follow), such that
the pieces' tokens together decode to the whole text.

Tokenising a piece alone does not promise that: many tokenizers put a space before whatever they
are given. So a piece's tokens are those that follow its predecessor's in the tokens of both
together. Where a token would reach over the boundary, which a prompt that was given to a model
can't have, the piece is tokenised behind a character that it does not join with; decoding decides
whether that is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "0", "a", ".", " ", "Z", "é", ":", "中", ")")
"""Characters that a piece is tokenised behind; some do not join with it."""


class PieceTokenizer:
    """[[[prompt ids], [response ids]], ...] = PieceTokenizer(tokenizer)([["2+2=", "4"], ...])

    No special tokens are added; those that a text spells become tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The tokens of each piece of each row; an empty piece has none."""
        ids = self._tokens(_texts(rows))
        tokens = []
        for row in rows:
            context = ""
            pieces: list[list[int]] = []
            for piece in row:
                if not piece:
                    pieces.append([])
                    continue
                pieces.append(self._after(context, piece, ids))
                context = piece
            tokens.append(pieces)
        return tokens

    def _tokens(self, texts: Sequence[str]) -> dict[str, list[int]]:
        if not texts:
            return {}
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False
        )
        return dict(zip(texts, encoded["input_ids"], strict=True))

    def _after(self, context: str, piece: str, ids: dict[str, list[int]]) -> list[int]:
        if not context:
            return ids[piece]
        before, joint = ids[context], ids[context + piece]
        if joint[: len(before)] == before:
            return joint[len(before) :]
        expected = self._decoded(joint)
        alone = []
        for candidate in self._candidates(piece):
            alone = candidate
            if self._decoded(before + candidate) == expected:
                return candidate
        # A tokenizer that does not keep the text has no tokens for it; the piece alone is as near
        # as it gets.
        if expected != context + piece or self._decoded(before) != context:
            return alone
        raise ValueError(
            f"the tokenizer has no tokens for {piece[:40]!r} after {context[-40:]!r} that decode "
            "to both together; put a line break between them"
        )

    def _candidates(self, piece: str) -> Iterator[list[int]]:
        """Tokens for the piece, the usual ones first; the last are those of the piece alone."""
        tails = []
        for anchor in ANCHORS:
            ids = self._tokens([anchor, anchor + piece])
            anchored, both = ids[anchor], ids[anchor + piece]
            if anchored and both[: len(anchored)] == anchored:
                tails.append(both[len(anchored) :])
        yield from sorted(tails, key=len)
        yield self._tokens([piece])[piece]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _texts(rows: Sequence[Sequence[str]]) -> list[str]:
    """Every text whose tokens are needed, once: each piece that another follows, and both
    together."""
    texts: dict[str, None] = {}
    for row in rows:
        context = ""
        for piece in filter(None, row):
            if context:
                texts[context] = None
            texts[context + piece] = None
            context = piece
    return list(texts)
