"""Reads rows of parquet files, jsonl files and hub datasets, each with its place for error
messages.

Leaves out what the rows mean: columns are checked in tokenize.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

SUFFIXES = (".parquet", ".jsonl")
READ_ROWS = 1024
"""Rows that are read and tokenised at a time."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """SourceRow(place="train.jsonl, line 3", values={"prompt": "2+2=", "answer": "4"})"""

    place: str
    values: dict[str, Any]


def read(places: Sequence[str]) -> Iterator[SourceRow]:
    """All rows of all places, in order."""
    for place in places:
        files = find_files(place)
        if files is None:
            yield from read_hub(place)
        for path in files or ():
            if path.suffix == ".parquet":
                yield from read_parquet(path)
            else:
                yield from read_jsonl(path)


def find_files(place: str) -> list[Path] | None:
    """The files that a place stands for, sorted; None for a hub name."""
    path = Path(place).expanduser()
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.suffix in SUFFIXES)
    elif path.is_file():
        files = [path]
    elif set(place) & set("*?["):
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    elif (
        path.suffix in (*SUFFIXES, ".json", ".csv", ".txt")
        or path.is_absolute()
        or place.startswith((".", "~"))
    ):
        raise ValueError(
            f"data {place!r}: there is no such file (working directory {Path.cwd()}); give an "
            "existing path or a hub name"
        )
    else:
        return None
    if not files:
        raise ValueError(f"data {place!r}: no file there ends in {' or '.join(SUFFIXES)}")
    wrong = [file for file in files if file.suffix not in SUFFIXES]
    if wrong:
        raise ValueError(
            f"data {str(wrong[0])!r}: only {' and '.join(SUFFIXES)} files are read; convert it"
        )
    return files


def read_parquet(path: Path) -> Iterator[SourceRow]:
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=READ_ROWS):
                for values in batch.to_pylist():
                    yield SourceRow(f"{path}, row {number} (from 0)", values)
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"data {str(path)!r} can't be read as parquet: {error}; write it anew"
        ) from error


def read_jsonl(path: Path) -> Iterator[SourceRow]:
    """One JSON object a line; empty lines hold no row."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place}: not UTF-8 text ({error}); save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place}: not valid JSON: {error.msg} at character {error.pos + 1} of "
                    f"{_start(line)}; a line must be one object"
                ) from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"{place}: a {type(values).__name__}, not a JSON object; write {{column: "
                    "value, ...}"
                )
            yield SourceRow(place, values)


def read_hub(place: str) -> Iterator[SourceRow]:
    """owner/name[:config][:split], through `datasets` (its cache, its mirrors, its offline
    mode)."""
    import datasets

    name, *rest = place.split(":")
    if len(rest) > 2 or not all((name, *rest)):
        raise ValueError(
            f"data {place!r}: write owner/name, owner/name:split or owner/name:config:split"
        )
    split, config = "train", None
    if rest:
        split = rest[-1]
    if len(rest) == 2:
        config = rest[0]
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data {place!r} is neither a file nor a dataset that the hub gives us "
            f"({type(error).__name__}: {error}); check the name, config and split, or the network"
        ) from error
    for number, values in enumerate(dataset):
        yield SourceRow(f"{place}, row {number} (from 0)", values)


def _start(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", errors="replace"))
