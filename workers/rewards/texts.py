"""Rewards that look at the text alone: choices, equality, form and length."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

OPENING = r"""(?:[\s:=>*_"'`$(\[{-]|\\[a-z]+\{|\\\()*"""
"""Before a letter may stand white space, quotes, brackets, and LaTeX's \\text{."""
LETTER = rf"{OPENING}(?P<letter>[A-Z])(?!\w|['\u2019]\w)"
BOXED = re.compile(rf"\\boxed\{{{OPENING}(?P<letter>[A-Z])(?=[\s)}}\].:,$\\])", re.IGNORECASE)
ANSWER = re.compile(
    rf"\b(?:answer(?:\s+(?:choice|option|letter))?|correct\s+(?:choice|option|letter))\b"
    rf"(?:\W{{0,4}}\b(?:is|was)\b)?{LETTER}",
    re.IGNORECASE,
)
"""The answer is (B). / **Answer**: B / <answer>b</answer>"""
OPTION = re.compile(rf"\b(?:choice|option)\b(?:\s+is\b)?{LETTER}", re.IGNORECASE)
ALONE = re.compile(r"(?<!\w)(?<!\w['\u2019(])(?P<letter>[A-Z])(?!\w|['\u2019-]\w|[+#&])")
"""A capital letter that is a word: (B), B., **B**, $B$."""
SMALL = re.compile(r"\A\W*(?P<letter>[a-z])(?=\W*\Z|[).:])|(?<!\w)\((?P<bracketed>[a-z])\)")
"""b / b) Paris / it is (b)"""
WORD = re.compile(r"\s+(?!(?:is|was|are|and|or|but|not|because|since|as|looks|seems|would)\b)[a-z]")
"""Behind "a" and "I" where they are words: a cat, I think; not A is right."""


def multiple_choice(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    choices: str | Sequence[object] | Mapping[str, Sequence[str]] | None = None,
    **columns: object,
) -> float:
    """1.0 if the letter that the response chooses is the answer's, else 0.0.

    answer: a letter, "(B)", or a number that counts the choices from 0. choices: their letters, A to
    J where nothing is given; a column of that name may hold their texts as a list (MMLU's), which
    are A, B, ..., or {"text": [...], "label": ["A", "B"]} (ARC's). The chosen letter is the
    last boxed one, else the last one after "answer", else after "option" or "choice", else the
    last capital letter that stands alone and is no word of a sentence ("A cat", "I think"), else a
    small one that is all of the response, begins it as "b)" does, or stands in brackets.
    """
    letters = letters_of(choices)
    if isinstance(answer, float) and answer.is_integer():  # as tables with gaps hold integers
        answer = int(answer)
    text = str(answer).strip().strip("().").upper()
    if (isinstance(answer, int) and not isinstance(answer, bool)) or text.isdecimal():
        position = int(text)
        if not 0 <= position < len(letters):
            raise ValueError(
                f"answer is {answer!r}, which counts none of the choices {letters} (from 0)"
            )
        text = letters[position]
    if len(text) != 1 or text not in letters:
        raise ValueError(f"answer is {answer!r}; give a letter of {letters} or its number from 0")
    return float(chosen_letter(unicodedata.normalize("NFKC", response), letters) == text)


def letters_of(choices: str | Sequence[object] | Mapping[str, Sequence[str]] | None) -> str:
    """The letters of the choices, such as "ABCD": as text, by the number of their texts, or by their
    labels."""
    if choices is None:
        return "ABCDEFGHIJ"
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(choices, str):
        letters = choices.upper()
    elif isinstance(choices, Mapping):
        letters = "".join(choices.get("label", ()))
    if not letters or not set(letters) <= set(string.ascii_uppercase) or len(choices) > 26:
        raise ValueError(
            f"choices is {str(choices)[:60]!r}; give capital letters, a list of at most 26 texts, or "
            "their labels as {label: [A, B]}"
        )
    return letters


def chosen_letter(response: str, choices: str) -> str:
    """The letter of `choices` that a response comes to; empty where it names none."""
    for pattern in (BOXED, ANSWER, OPTION, ALONE, SMALL):
        last = ""
        for match in pattern.finditer(response):
            letter = match[match.lastgroup or 0]
            is_word = letter in "aiI" or (letter == "A" and pattern is ALONE)
            if is_word and WORD.match(response, match.end(match.lastgroup or 0)):
                continue
            if letter.upper() in choices:
                last = letter.upper()
        if last:
            return last
    return ""


def exact_match(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    ignore_case: bool = True,
    ignore_punctuation: bool = False,
    **columns: object,
) -> float:
    """1.0 if the response is the answer, or one of a list of answers; white space does not
    count. 18.0 as a number is also 18."""
    answers = answer if isinstance(answer, list | tuple) else [answer]
    for each in answers:
        if isinstance(each, dict | list) or each is None:
            raise ValueError(
                f"answer is {str(answer)[:60]!r}; give text, a number, or a list of them (of a "
                "dictionary one entry, as in data.answer_column=answer.aliases)"
            )
    if not answers:
        raise ValueError("answer is an empty list, which no response equals; give one")
    whole = [int(each) for each in answers if isinstance(each, float) and each.is_integer()]
    plain = [_normal(str(text), ignore_case, ignore_punctuation) for text in [*answers, *whole]]
    return float(_normal(response, ignore_case, ignore_punctuation) in plain)


def _normal(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    text = unicodedata.normalize("NFKC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = re.sub(r"[^\w\s]", "", text)
    return " ".join(text.split())


def matches(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    pattern: str,
    whole: bool = True,
    **columns: object,
) -> float:
    """1.0 if the response has the form of the regular expression, else 0.0; . matches line breaks
    too.

    whole: from its first to its last character, white space around it aside; false: somewhere in
    it.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"pattern is {pattern!r}, which is no regular expression: {error}"
        ) from None
    found = form.fullmatch(response.strip()) if whole else form.search(response)
    return float(found is not None)


def length_penalty(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    free_words: int = 512,
    most_words: int = 1024,
    cut_short: float = -1.0,
    **columns: object,
) -> float:
    """0.0 up to free_words words, falling evenly to -1.0 at most_words; `cut_short` for a
    response that did not end by itself (the soft punishment of DAPO, Yu et al. 2025, section
    3.4, in words)."""
    if free_words >= most_words:
        raise ValueError(
            f"free_words is {free_words}, most_words {most_words}; use a smaller free_words"
        )
    if finish_reason == "length":
        return float(cut_short)
    over = len(response.split()) - free_words
    return -min(1.0, max(0.0, over / (most_words - free_words)))
