"""RowStream: rows of one generation engine that are drawn in slices, by uid and sample.

The other half of workers/streaming_actor.py, inside the process. It moves no weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from hybridflow.batch import Batch
from workers.generation.rows import FinishedRow
from workers.roles import EndedRow, Progress, RowName
from workers.sampler import Sampler


@dataclass(frozen=True, slots=True)
class InFlightRow:
    """A row that was submitted."""

    name: RowName
    prompt_length: int


class Stream(Protocol):
    """The rows of a StreamingGenerator, which has these methods' documentation."""

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None: ...

    def advance(self, limit: int) -> Progress:
        """The engine has its weights."""
        ...

    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch: ...

    def discard(self) -> None: ...

    def close(self) -> None:
        """Ends what goes on beside the engine."""
        ...


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

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        """See StreamingGenerator.submit."""
        lengths = prompts.ragged("prompt_ids").lengths.tolist()
        names = row_names(prompts, greedy=not do_sample)
        keys = self._sampler.submit(prompts, do_sample=do_sample)
        for key, name, length in zip(keys, names, lengths, strict=True):
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
            ended.append(EndedRow(in_flight.name, int(versions[0]), int(versions[-1])))
        return Progress(
            finished=tuple(ended), num_steps=num_steps, seconds=time.perf_counter() - started
        )

    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        """See StreamingGenerator.collect."""
        ended = [self._ended.pop(name) for name in row_names(rows, greedy=not do_sample)]
        lengths = torch.tensor([length for _, length in ended], dtype=torch.int64)
        return self._sampler.responses([row for row, _ in ended], lengths)

    def discard(self) -> None:
        """See StreamingGenerator.discard."""
        self._sampler.engine.cancel(list(self._in_flight))
        self._in_flight.clear()
        self._ended.clear()

    def close(self) -> None:
        """Nothing goes on beside the engine."""


def row_names(rows: Batch, *, greedy: bool = False) -> list[RowName]:
    """The name of every row."""
    uids, samples = rows.tensor("uid").tolist(), rows.tensor("sample").tolist()
    return [RowName(uid, sample, greedy) for uid, sample in zip(uids, samples, strict=True)]
