"""Streams: what a step may draw besides the prompts that it is given. An entry of ALGORITHMS names
the ones that its page asks for.

Positions are part of the loop's checkpoint, so that a resumed run draws what the undisturbed one
would have drawn.
"""

from __future__ import annotations

from typing import Protocol

from controllers.data import RowLoader
from hybridflow.batch import Batch
from hybridflow.columns import Ragged


class Stream(Protocol):
    """self.prompts.take(3)"""

    def take(self, num_rows: int = 0) -> Batch:
        """The next rows; 0: as many as the settings say."""


class PromptStream:
    """The prompts of the run: a step's are next(prompts), and a step that needs further ones
    (DAPO) goes on where that ended."""

    def __init__(self, loader: RowLoader, samples_per_prompt: int) -> None:
        self.loader, self.samples_per_prompt = loader, samples_per_prompt

    def take(self, num_rows: int = 0) -> Batch:
        """The next num_rows prompts, each samples_per_prompt times."""
        return self.loader.take(num_rows or self.loader.config.batch_size).repeat(
            self.samples_per_prompt
        )

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Batch:
        """The rows of one step; the stream has no end."""
        return self.take()


class TextStream:
    """Text of the pretraining distribution: rows whose prompt is their first token and whose
    response is the rest."""

    def __init__(self, loader: RowLoader) -> None:
        self.loader = loader

    def take(self, num_rows: int = 0) -> Batch:
        rows = (
            self.loader.take(num_rows or self.loader.config.batch_size)
            .ragged("prompt_ids")
            .unbind()
        )
        prompts = [row[:1] for row in rows]
        responses = [row[1:] for row in rows]
        return Batch.of(prompt_ids=Ragged.of(prompts), response_ids=Ragged.of(responses))


class EmptyStream:
    """The stream of a setting that is not used: no rows."""

    def take(self, num_rows: int = 0) -> Batch:
        return Batch.of()


class NoStream:
    """For tracing, which draws nothing."""

    def take(self, num_rows: int = 0) -> Batch:
        raise ValueError(
            "the step draws from a stream while it is traced; put what depends on numbers into a "
            "function marked @on_controller"
        )
