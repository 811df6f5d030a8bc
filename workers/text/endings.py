"""What ends a turn and a response: the tokenizer's end-of-sequence token, the token that the chat
template writes after an assistant's turn, and those that generation_config.json and config.json
name.

The same answer serves learning (the last token of a response), sampling (where it stops), scoring
(the text of a response has no end) and export (generation_config.json).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from workers.config import ModelConfig
from workers.published import read_config
from workers.tokenizer import load_tokenizer

LOGGER = logging.getLogger(__name__)

SENTINEL = "Answer7x19q"
"""An assistant's content that no template changes; the text after it is what ends a turn."""
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""Errors that a chat template, which is code of whoever wrote it, raises for messages it does not
fit."""


@dataclass(frozen=True, slots=True)
class TurnEnding:
    r"""TurnEnding(text="<|im_end|>\n", end=10, token_id=151645): `text` follows the assistant's
    words, and its first `end` characters end the turn; all of it where no token does."""

    text: str
    end: int
    token_id: int | None


def end_token_ids(
    model: ModelConfig,
    config: PretrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[int, ...]:
    """All tokens that end a response, ascending: model.end_token_ids, or else every one that
    tokenizer, chat template, generation_config.json and config.json name."""
    if model.end_token_ids is not None:
        return tuple(sorted(set(model.end_token_ids)))
    if config is None:
        config = _config(model)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(model)
        except ValueError:  # a model without a tokenizer, asked with tokens
            tokenizer = None
    ends: set[int] = set()
    if config is not None:
        ends = _of_the_model(model, config, tokenizer)
    if tokenizer is not None:
        ends |= _of_the_tokenizer(tokenizer)
    return tuple(sorted(ends))


def _config(model: ModelConfig) -> PretrainedConfig | None:
    """The model's configuration; None for the directory of a tokenizer alone."""
    try:
        return read_config(model)
    except (OSError, ValueError):
        return None


def save_endings(directory: Path, end_token_ids: Sequence[int]) -> None:
    """Names the tokens that end a response in the directory's generation_config.json, where
    transformers, vLLM and the next stage look for them; the rest of the file stays as it is."""
    if not end_token_ids:
        return
    path = directory / GENERATION_CONFIG_NAME
    settings: dict[str, Any] = {}
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
    settings["eos_token_id"] = list(end_token_ids)
    if len(end_token_ids) == 1:
        settings["eos_token_id"] = end_token_ids[0]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _of_the_model(
    model: ModelConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> set[int]:
    """generation_config.json's tokens, and config.json's; of the latter, where the former names
    any, only special ones: it often holds the default of the model's class."""
    try:
        generation = GenerationConfig.from_pretrained(model.path, revision=model.revision)
        ends = set(_listed(generation.eos_token_id))
    except OSError as error:
        if (Path(model.path) / GENERATION_CONFIG_NAME).is_file():
            raise ValueError(
                f"model.path is {model.path!r}: its {GENERATION_CONFIG_NAME} can't be read, which names "
                "the tokens that end a response; correct or remove it"
            ) from error
        ends = set()  # the model has none
    special: set[int] = set()
    if tokenizer is not None:
        special = set(special_tokens(tokenizer).values())
    listed: list[int] = []
    for part in (config, config.get_text_config()):
        # Not every configuration of a model with images has one beside its text model's.
        listed += _listed(part.to_dict().get("eos_token_id"))
    for token in listed:
        if not ends or token in special:
            ends.add(token)
    return ends


def _of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = set()
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    ending = turn_ending(tokenizer)
    if ending is not None and ending.token_id is not None:
        ends.add(ending.token_id)
    return ends


def _listed(eos: int | Sequence[int] | None) -> list[int]:
    if eos is None:
        return []
    if isinstance(eos, int):
        return [eos]
    return list(eos)


def turn_ending(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]] = ({"role": "user", "content": "0"},),
    **arguments: Any,
) -> TurnEnding | None:
    """The text that the chat template writes after an assistant's words, as an answer to
    `messages`; None without a template, and where it can't be told."""
    if tokenizer.chat_template is None and arguments.get("chat_template") is None:
        return None
    try:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": SENTINEL}], tokenize=False, **arguments
        )
    except TEMPLATE_ERRORS as error:
        LOGGER.debug("what the chat template writes after a turn is not known: %s", error)
        return None
    _, sentinel, tail = text.rpartition(SENTINEL)
    if not sentinel:
        return None
    return ending_of(tokenizer, tail)


def ending_of(tokenizer: PreTrainedTokenizerBase, tail: str) -> TurnEnding:
    """Where a turn ends in the text that follows its words: behind the first special token, or
    else the first other added token."""
    special = special_tokens(tokenizer)
    for tokens in (special, _added_tokens(tokenizer)):
        places = [(tail.find(token), -len(token), token) for token in tokens if token in tail]
        if places:
            start, _, token = min(places)
            return TurnEnding(tail, start + len(token), tokens[token])
    return TurnEnding(tail, len(tail), None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that are registered as special."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[token.content] = number
    return special


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of all added tokens but runs of white space."""
    added = tokenizer.get_added_vocab()
    return {token: number for token, number in added.items() if token.strip()}
