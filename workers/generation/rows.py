"""Rows of a generation engine: what a finished one consists of, and a growing one of an engine that
counts and stops by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from workers.generation.config import SamplingConfig
from workers.images.reference import ImageReference


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRow:
    """A prompt with what decides its response, besides the weights and the sampling."""

    prompt: NDArray[np.int64]
    """[tokens], at least one."""
    seed: int
    position: int
    """Which of the seed's draws is the response's first token."""
    most_tokens: int
    """The response ends with as many, at the latest."""
    images: tuple[ImageReference, ...] = ()
    """Those of the prompt, in the order of their tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRow:
    """A response of two tokens, of which the second was drawn after a weight update:

    FinishedRow(token_ids=[8, 2], log_probs=[-.1, -.2], finish_reason="stop", weight_versions=[3, 4])
    """

    token_ids: NDArray[np.int64]
    """[tokens], at least one, with the token that ended the response."""
    log_probs: NDArray[np.float32]
    """[tokens], as Generations.log_probs: each of the weights that drew the token."""
    finish_reason: str
    """ "stop" or "length"."""
    weight_versions: NDArray[np.int64]
    """[tokens]: the version of the weights that drew each token; it never falls."""
    routes: NDArray[np.int16] | None = None
    """[tokens of prompt and response - 1, layers, experts per token]: the experts of a mixture that
    each token was sent to, by layer with experts; None where they are not recorded. The last token
    was not read."""


def pop_rows(
    finished: dict[int, FinishedRow], keys: Collection[int] | None
) -> dict[int, FinishedRow]:
    """Takes the rows of `keys` (None: of all) that have finished out of `finished`."""
    chosen = list(finished) if keys is None else [key for key in keys if key in finished]
    return {key: finished.pop(key) for key in chosen}


class StopRule:
    """Why a response ends, if it does."""

    def __init__(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        if sampling.stop_strings and tokenizer is None:
            raise ValueError(
                f"sampling.stop_strings={sampling.stop_strings} needs a tokenizer; set "
                "generation.sampling.stop_strings too"
            )
        self._token_ids = set(token_ids)
        self._sampling = sampling
        self._tokenizer = tokenizer

    def reason(self, tokens: list[int], most: int) -> str:
        """ "stop", "length", or "" to go on."""
        if tokens[-1] in self._token_ids:
            return "stop"
        if self._sampling.stop_strings and self._tokenizer is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if any(string in text for string in self._sampling.stop_strings):
                return "stop"
        return "length" if len(tokens) == most else ""


class GrowingRow:
    """A response as it grows; tokens after its end are ignored."""

    def __init__(
        self,
        key: int,
        prompt: NDArray[np.int64],
        seed: int,
        position: int,
        sampling: SamplingConfig,
        stop: StopRule,
        most: int,
        images: tuple[ImageReference, ...] = (),
    ) -> None:
        """`position`: of its first token among the draws of `seed`. `most`: tokens after which it
        ends at the latest."""
        self.key, self.seed, self.sampling = key, seed, sampling
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.weight_versions: list[int] = []
        self.finish_reason = ""
        """Empty while it goes on."""
        self.routes: list[NDArray[np.int16]] = []
        """Routes of the tokens that were read, in pieces; none where they are not recorded."""
        self.images = images
        self._prompt, self._position = prompt, position
        self._stop, self._most = stop, most

    @property
    def prefix(self) -> NDArray[np.int64]:
        """[tokens]: the prompt and the tokens drawn."""
        return np.concatenate([self._prompt, np.array(self.tokens, dtype=np.int64)])

    @property
    def position(self) -> int:
        """The position of the next token among the draws of the seed."""
        return self._position + len(self.tokens)

    def take(self, token: int, log_prob: float, weight_version: int) -> None:
        if self.finish_reason:
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self.weight_versions.append(weight_version)
        self.finish_reason = self._stop.reason(self.tokens, self._most)

    def finished(self) -> FinishedRow:
        return FinishedRow(
            token_ids=np.array(self.tokens, dtype=np.int64),
            log_probs=np.array(self.log_probs, dtype=np.float32),
            finish_reason=self.finish_reason,
            weight_versions=np.array(self.weight_versions, dtype=np.int64),
            routes=np.concatenate(self.routes) if self.routes else None,
        )
