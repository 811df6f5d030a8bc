"""BadSteps: steps whose gradient was not finite, and losses that jump.

    <output_dir>/bad/step-00000007/rows.jsonl              uid, mini-batch, reward, ... of each row
                                   columns.safetensors     its tokens and every number of a token

What an optimizer step does is decided where it is taken (workers/not_finite.py); this file reads
that off the metrics, saves the rows, and remembers which rows a rewound run passes over.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.errors import NotFiniteError

LOGGER = logging.getLogger(__name__)
DIRECTORY, ROWS, COLUMNS = "bad", "rows.jsonl", "columns.safetensors"
NAME = re.compile(r"(?P<role>.+)/not_finite/(?P<what>rewind|mini_batch_(?P<mini_batch>\d+))$")
WATCHED = re.compile(r".+/(loss|grad_norm)$")
"""Metrics that are watched for spikes."""
HISTORY, FEWEST, DEVIATIONS = 50, 20, 10.0
"""A spike is more than so many median absolute deviations over the median of the last steps."""
RARE, BEYOND = 0.9, 4.0
"""And more than BEYOND times as far from it as the share RARE of them."""
ROUNDING = 1e-6
"""A loss or a norm up to this is of a step without a signal, such as groups whose rewards are all
equal; it says nothing about the size of the others."""


class StepGivenUp(RuntimeError):
    """A step under on_nonfinite=rewind: everything has to go back to the newest commit."""

    def __init__(self, step: int, roles: tuple[str, ...], uids: tuple[int, ...]) -> None:
        super().__init__(
            f"step {step}: the gradient of {', '.join(roles)} is not finite; on_nonfinite=rewind "
            "goes back to the newest commit, which a whole run does, not a single step"
        )
        self.step, self.roles, self.uids = step, roles, uids


class BadSteps:
    """bad = BadSteps(output_dir)
    with bad.saving(step, prompts):           # the rows of a step that on_nonfinite=stop ends
        metrics = dict(algorithm.step(prompts))
    bad.look_at(step, position, prompts, metrics, rows)     # StepGivenUp under rewind
    bad.watch(step, metrics)
    """

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / DIRECTORY
        self._given_up: dict[int, list[int]] = {}
        """The rows of the steps that were given up, by the position of the data before them."""
        self._history: dict[str, dict[int, float]] = {}

    @contextmanager
    def saving(self, step: int, prompts: Batch) -> Iterator[None]:
        """Saves the prompts of a step that a gradient ends within."""
        try:
            yield
        except NotFiniteError:
            self._save(step, prompts, set())
            raise

    def look_at(
        self,
        step: int,
        position: int,
        prompts: Batch,
        metrics: Mapping[str, float],
        rows: Batch | None,
    ) -> None:
        """Saves the rows of the mini-batches that a role left out; raises StepGivenUp where the
        run has to go back. `position`: of the data before the step; `rows`: what it trained on,
        `prompts` where that is unknown."""
        roles: dict[str, set[int]] = {}
        rewinds = False
        for name in metrics:
            match = NAME.match(name)
            if match is None:
                continue
            labels = roles.setdefault(match["role"], set())
            if match["mini_batch"] is None:
                rewinds = True
            else:
                labels.add(int(match["mini_batch"]))
        if not roles:
            return
        path = self._save(step, prompts if rows is None else rows, set().union(*roles.values()))
        for role, labels in roles.items():
            LOGGER.warning(
                "step %d: the gradient of %s is not finite in mini-batches %s; their rows are in %s",
                step,
                role,
                sorted(labels),
                path,
            )
        if rewinds:
            uids = tuple(prompts.tensor("uid").tolist())
            self._given_up[position] = list(dict.fromkeys(uids))
            raise StepGivenUp(step, tuple(roles), uids)

    def num_next(self, position: int) -> int:
        """Rows of steps that were given up, those that come next."""
        return len(self._uids_next(position))

    def passes_over(self, position: int, prompts: Batch) -> bool:
        """Whether these are the rows that were given up there."""
        return prompts.tensor("uid").tolist() == self._uids_next(position)

    def _uids_next(self, position: int) -> list[int]:
        uids: list[int] = []
        while position + len(uids) in self._given_up:
            uids += self._given_up[position + len(uids)]
        return uids

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warns where a loss or a gradient norm is far over those of the steps before."""
        for name, value in metrics.items():
            if not WATCHED.match(name) or not math.isfinite(value) or abs(value) <= ROUNDING:
                continue
            history = self._history.setdefault(name, {})
            for other in [other for other in history if other >= step]:
                del history[other]  # of a timeline that was taken back
            if is_spike(list(history.values()), value):
                LOGGER.warning(
                    "step %d: %s jumps to %.3g; the median of the last %d steps is %.3g",
                    step,
                    name,
                    value,
                    len(history),
                    median(history.values()),
                )
            history[step] = value
            if len(history) > HISTORY:
                del history[min(history)]

    def _save(self, step: int, batch: Batch, mini_batches: set[int]) -> Path:
        """The rows of these mini-batches, all rows where that is unknown. What the disk refuses is
        said in the log."""
        if mini_batches and "mini_batch" in batch:
            labels = torch.tensor(sorted(mini_batches))
            batch = batch.rows(torch.isin(batch.tensor("mini_batch"), labels).nonzero().squeeze(1))
        path = self.directory / f"step-{step:08d}"
        lines, tensors = contents(batch)
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
            (path / ROWS).write_text(text)
            if tensors:
                save_file(tensors, path / COLUMNS)
        except OSError as error:
            LOGGER.warning("the rows of step %d could not be saved: %s", step, error)
        return path


def contents(batch: Batch) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The columns of one value a row, by row; and the others as NAME with NAME.lengths."""
    lines: list[dict[str, Any]] = [{} for _ in range(len(batch))]
    tensors: dict[str, Tensor] = {}
    for name in batch.columns:
        column = batch[name]
        if isinstance(column, Ragged):
            tensors[name] = column.values.contiguous()
            tensors[f"{name}.lengths"] = column.lengths.contiguous()
            continue
        values = column.tolist() if isinstance(column, Tensor) else list(column)
        for line, value in zip(lines, values, strict=True):
            if isinstance(value, float) and not math.isfinite(value):
                value = str(value)  # JSON has no infinity
            line[name] = value
    return lines, tensors


def is_spike(history: list[float], value: float) -> bool:
    """Whether a value is more than DEVIATIONS median absolute deviations over the median, and far
    beyond what the steps before reached more than now and then: a GRPO loss is about 0 at most steps
    by its nature, and noise at the others."""
    if len(history) < FEWEST:
        return False
    middle = median(history)
    distances = sorted(abs(other - middle) for other in history)
    usual = distances[int(RARE * (len(distances) - 1))]
    over = value - middle
    return over > DEVIATIONS * max(median(distances), 1e-3 * abs(middle)) and over > BEYOND * usual
