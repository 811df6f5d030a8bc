"""Checks of inputs, and the tokens that end a response, for every engine; draws.py draws."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from workers.config import ModelConfig
from workers.generation.config import SamplingConfig
from workers.published import read_config
from workers.text import endings

LOGGER = logging.getLogger(__name__)


def check_sampling(sampling: SamplingConfig) -> None:
    """Raise a ValueError for a setting outside its range."""
    checks = [
        (
            "temperature",
            sampling.temperature,
            sampling.greedy or sampling.temperature > 0,
            "a value over 0, or greedy=true",
        ),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "a value in (0, 1]"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (all tokens) or more"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "a value in [0, 1]"),
        (
            "max_response_tokens",
            sampling.max_response_tokens,
            sampling.max_response_tokens >= 1,
            "at least 1",
        ),
        (
            "stop_strings",
            sampling.stop_strings,
            all(sampling.stop_strings),
            "strings that are not empty",
        ),
    ]
    for field, value, valid, fix in checks:
        if not valid:
            raise ValueError(f"sampling.{field}={value!r}: use {fix}")


def check_prompts(
    prompts: Sequence[NDArray[np.int64]],
    seeds: NDArray[np.int64],
    most: Sequence[int],
    *,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Raise a ValueError that names the row for a prompt that the model cannot continue by its
    `most` tokens."""
    if len(seeds) != len(prompts):
        raise ValueError(
            f"seeds: {len(seeds)} for {len(prompts)} prompts; pass one seed for every row"
        )
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompts: row {row} is empty; a prompt needs at least one token (a "
                "beginning-of-sequence token, say)"
            )
        if len(prompt) + most[row] > max_model_len:
            raise ValueError(
                f"prompts: row {row} has {len(prompt)} tokens, and with "
                f"max_response_tokens={most[row]} is over "
                f"max_model_len={max_model_len}; filter longer prompts, lower max_response_tokens "
                "or raise generation.max_model_len (and kv_cache_bytes, on a CPU)"
            )
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompts: row {row} has token id {low if low < 0 else high} outside the "
                f"vocabulary 0..{vocab_size - 1}; use the model's own tokenizer"
            )


def most_tokens(
    num_rows: int, sampling: SamplingConfig, limits: NDArray[np.int64] | None
) -> list[int]:
    """[rows]: tokens after which each response ends at the latest; a ValueError names the row
    of a limit under 1."""
    if limits is None:
        return [sampling.max_response_tokens] * num_rows
    if len(limits) != num_rows:
        raise ValueError(f"limits: {len(limits)} for {num_rows} prompts; pass one for every row")
    for row in np.flatnonzero(limits < 1):
        raise ValueError(f"max_response_tokens of row {row} is {limits[row]}; use at least 1")
    return [min(int(limit), sampling.max_response_tokens) for limit in limits]


def first_positions(num_rows: int, positions: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """[rows]: the position of each response's first token among the draws of its seed; a
    ValueError names the row of a negative one."""
    if positions is None:
        return np.zeros(num_rows, dtype=np.int64)
    if len(positions) != num_rows:
        raise ValueError(
            f"positions: {len(positions)} for {num_rows} prompts; pass one for every row"
        )
    for row in np.flatnonzero(positions < 0):
        raise ValueError(f"positions: {positions[row]} in row {row}; use 0 or more")
    return np.asarray(positions, dtype=np.int64)


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The Hugging Face config of the text model."""
    return read_config(model).get_text_config()


def end_token_ids(model: ModelConfig, config: PretrainedConfig) -> tuple[int, ...]:
    """The tokens that end the model's responses (workers/text/endings.py), those that it can
    draw."""
    ends = [token for token in endings.end_token_ids(model, config) if token < config.vocab_size]
    if not ends:
        LOGGER.warning(
            "%s: neither tokenizer, chat template, generation_config.json nor config.json names a "
            "token that ends a response, so every response takes max_response_tokens; set "
            "model.end_token_ids or generation.sampling.stop_token_ids",
            model.path,
        )
    return tuple(ends)


def with_special_stops(
    sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase, field: str
) -> SamplingConfig:
    """Stop strings that are special tokens as stop_token_ids: they stand in no text. A ValueError
    for one with a special token inside; `field` is the setting's name."""
    special = endings.special_tokens(tokenizer)
    strings, token_ids = [], list(sampling.stop_token_ids)
    for string in sampling.stop_strings:
        if string in special:
            token_ids.append(special[string])
            continue
        inside = [token for token in special if token in string]
        if inside:
            raise ValueError(
                f"{field}.stop_strings has {string!r}, and {inside[0]!r} in it is a special "
                f"token, which no text holds; use {inside[0]!r} alone, or "
                f"{field}.stop_token_ids=[{special[inside[0]]}]"
            )
        strings.append(string)
    return replace(sampling, stop_strings=strings, stop_token_ids=token_ids)


def stop_token_ids(sampling: SamplingConfig, end_tokens: Sequence[int]) -> list[int]:
    """All tokens that end a response, ascending."""
    return sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else end_tokens)})
