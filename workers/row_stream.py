"""RowStream: rows of one generation engine that are drawn in slices, by uid and sample.

The other half of workers/streaming_actor.py, inside the process. It moves no weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hybridflow.batch import Batch
from workers.generation.rows import FinishedRow
from workers.roles import Progress
from workers.sampler import Sampler

RowName = tuple[int, int]
"""uid and sample."""


@dataclass(frozen=True, slots=True)
class InFlightRow:
    """A row that was submitted."""

    name: RowName
    prompt_length: int


class RowStream:
    """stream = RowStream(sampler); stream.submit(prompts)
    progress = stream.advance(16)           # until its rows are among progress.finished
    responses = stream.collect(rows)
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._in_flight: dict[int, InFlightRow] = {}
        """By the engine's key."""
        self._ended: dict[RowName, tuple[FinishedRow, int]] = {}
        """With the length of the prompt."""

    def submit(self, prompts: Batch) -> None:
        """See StreamingGenerator.submit."""
        lengths = prompts.ragged("prompt_ids").lengths.tolist()
        for key, name, length in zip(
            self._sampler.submit(prompts), row_names(prompts), lengths, strict=True
        ):
            self._in_flight[key] = InFlightRow(name, length)

    def advance(self, limit: int) -> Progress:
        """See StreamingGenerator.advance; the engine has its weights."""
        started, engine = time.perf_counter(), self._sampler.engine
        num_steps = engine.run(limit)
        ended = []
        for key, row in engine.finished(list(self._in_flight)).items():
            in_flight = self._in_flight.pop(key)
            self._ended[in_flight.name] = row, in_flight.prompt_length
            versions = row.weight_versions
            ended.append((*in_flight.name, int(versions[0]), int(versions[-1])))
        return Progress(
            finished=tuple(ended), num_steps=num_steps, seconds=time.perf_counter() - started
        )

    def collect(self, rows: Batch) -> Batch:
        """See StreamingGenerator.collect."""
        ended = [self._ended.pop(name) for name in row_names(rows)]
        lengths = torch.tensor([length for _, length in ended], dtype=torch.int64)
        return self._sampler.responses([row for row, _ in ended], lengths)

    def discard(self) -> None:
        """See StreamingGenerator.discard."""
        self._sampler.engine.cancel(list(self._in_flight))
        self._in_flight.clear()
        self._ended.clear()


def row_names(rows: Batch) -> list[RowName]:
    """(uid, sample) of every row."""
    return list(zip(rows.tensor("uid").tolist(), rows.tensor("sample").tolist(), strict=True))
