"""The files of recipes.evaluate and recipes.generate: responses as parquet, whatever the data's columns
hold, and the pass rate of every prompt.

A column that parquet can't hold as it is becomes JSON text, and a column of the data with the name
of one of ours is written under another one; a line says so. Files appear whole or not at all.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.whole_file import whole_file
from workers.text import ResponseReader

LOGGER = logging.getLogger(__name__)
DATA = "data."
"""Put before the name of a data's column that is the name of one of ours."""


class Responses:
    """responses = Responses(tokenizer, log_probs=False); responses.add(batch); responses.write(path)

    One row a response: prompt, response, finish_reason, row, sample, reward (where there is one)
    with its further numbers, the data's columns, token ids.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        log_probs: bool,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.log_probs = tokenizer, log_probs
        self.read_responses = ResponseReader(tokenizer, end_token_ids)
        self.rows: list[dict[str, Any]] = []
        """The columns that generation and reward wrote."""
        self.extras: list[Mapping[str, Any]] = []
        """The data's columns of the same rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, batch: Batch) -> None:
        prompts = [ids.tolist() for ids in batch.ragged("prompt_ids").unbind()]
        responses = [ids.tolist() for ids in batch.ragged("response_ids").unbind()]
        columns: dict[str, Sequence[Any]] = {
            "prompt": [prompt_text(self.tokenizer, ids) for ids in prompts],
            "response": self.read_responses(responses),
            "finish_reason": batch.objects("finish_reason"),
            "row": batch.tensor("uid").tolist(),
            "sample": batch.tensor("sample").tolist(),
            "response_ids": responses,
        }
        if "rewards" in batch:
            columns["reward"] = batch.tensor("rewards").tolist()
        if self.log_probs:
            log_probs = batch.ragged("rollout_log_probs").unbind()
            columns["log_probs"] = [values.tolist() for values in log_probs]
        further: Sequence[Mapping[str, float]] = [{}] * len(batch)
        if "reward_metrics" in batch:
            further = batch.objects("reward_metrics")
        for values, numbers in zip(zip(*columns.values(), strict=True), further, strict=True):
            row = dict(zip(columns, values, strict=True))
            for name, value in numbers.items():
                row[f"reward/{name}"] = float(value)
            self.rows.append(row)
        self.extras += batch.objects("extras")

    def write(self, path: Path) -> None:
        names = names_of(self.rows)
        columns = {name: parquet_column(name, values_of(name, self.rows)) for name in names}
        for name in names_of(self.extras):
            written = free_name(name, columns)
            if written != name:
                LOGGER.warning("%s: the data's column %r is written as %r", path, name, written)
            columns[written] = parquet_column(written, values_of(name, self.extras))
        with whole_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column that any row has, in the order of their first use."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def values_of(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [row.get(name) for row in rows]


def free_name(name: str, taken: Mapping[str, object]) -> str:
    """`name` as parquet can hold it, with "data." before it where it is taken."""
    name = name.encode("utf-8", "backslashreplace").decode()
    while name in taken:
        name = f"{DATA}{name}"
    return name


def parquet_column(name: str, values: list[Any]) -> pa.Array:
    """The values as they are, where parquet gives back the same; else as JSON text."""
    try:
        column = pa.array(values)
        # Arrow can hold what parquet can't, such as a structure without fields.
        pq.write_table(pa.table({name: column}), pa.BufferOutputStream())
        reason = "" if same(column.to_pylist(), values) else "its rows are not of one type"
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError, ValueError) as error:
        reason = " ".join(str(error).split())
    if not reason:
        return column
    LOGGER.warning("column %r is written as JSON text: parquet can't hold it (%s)", name, reason)
    return pa.array([json.dumps(value, default=plain) for value in values], type=pa.string())


def same(one: Any, other: Any) -> bool:
    """Equality by type and value, in which NaN equals itself and 1 is 1.0."""
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(same(value, other[name]) for name, value in one.items())
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(same, one, other))
        )
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def plain(value: object) -> str:
    """The text of a value that JSON has no word for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text whose tokens the prompt is: a beginning-of-sequence token that the tokenizer
    adds by itself is left out, or whoever reads the file would have two."""
    added = tokenizer("")["input_ids"][:1]
    if added and ids[:1] == added and added[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    return str(tokenizer.decode(ids))


def pass_rates(
    rows: Sequence[Mapping[str, Any]], success_reward: float, place: Callable[[int], str]
) -> list[dict[str, Any]]:
    """One row a prompt, in the order of the data: its row's number and place, how many samples it
    got, how many of them passed, and their mean reward."""
    # Rewards are float32, in which 0.9 is less than Python's 0.9.
    success = float(np.float32(success_reward))
    rewards: dict[int, list[float]] = {}
    for row in rows:
        rewards.setdefault(row["row"], []).append(row["reward"])
    prompts = []
    for number in sorted(rewards):
        scores = rewards[number]
        passed = sum(score >= success for score in scores)
        prompts.append(
            {
                "row": number,
                "place": place(number),
                "samples": len(scores),
                "passed": passed,
                "pass_rate": passed / len(scores),
                "mean_reward": math.fsum(scores) / len(scores),
            }
        )
    return prompts


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines; characters outside ASCII are escaped, so that any text can be written."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
