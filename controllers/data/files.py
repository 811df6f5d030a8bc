"""Reads rows of .jsonl, .json, .parquet and .csv files, compressed or not, in any case of the
suffix."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from hybridflow.wording import kind_of

BATCH_ROWS = 1024
MOST_CELL_CHARACTERS = 2**27
"""The longest cell of a .csv file that is read."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """SourceRow(place="train.jsonl, line 3", values={"prompt": "2+2=", "answer": "4"})"""

    place: str
    values: dict[str, Any]
    directory: Path | None = None
    """Where the file is, which relative paths in it begin from."""


def format_of(path: Path) -> str | None:
    """The format that the name tells, below a compression's suffix: jsonl for a.JSONL.gz."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if suffixes and suffixes[-1] in FORMATS:
        return suffixes[-1]
    return None


def read_file(path: Path) -> Iterator[SourceRow]:
    """The rows of one file, in order."""
    name = format_of(path)
    if name is None:
        known = ", ".join(f".{suffix}" for suffix in FORMATS)
        compressed = ", ".join(f".{suffix}" for suffix in COMPRESSIONS)
        raise ValueError(
            f"data {str(path)!r}: only {known} files are read, also with {compressed} behind; "
            "convert it"
        )
    try:
        with _opened(path) as file:
            for row in FORMATS[name](path, file):
                yield replace(row, directory=path.parent)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"data {str(path)!r} can't be read ({type(error).__name__}: {error}); write it anew"
        ) from error


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed where its name tells a compression."""
    opener = COMPRESSIONS.get(path.suffix.lower().removeprefix("."))
    if opener is None:
        return path.open("rb")
    return opener(path)


def _open_zstandard(path: Path) -> BinaryIO:
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {
    "gz": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    "bz2": lambda path: cast(BinaryIO, bz2.BZ2File(path)),
    "xz": lambda path: cast(BinaryIO, lzma.LZMAFile(path)),  # noqa: SIM115
    "zst": _open_zstandard,
}


def read_parquet(path: Path, file: BinaryIO) -> Iterator[SourceRow]:
    try:
        source: Any = path
        if path.suffix.lower().removeprefix(".") in COMPRESSIONS:
            source = pyarrow.BufferReader(file.read())
        with pyarrow.parquet.ParquetFile(source, memory_map=True) as table:
            check_names(str(path), table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    yield SourceRow(f"{path}, row {number} (from 0)", values)
                    number += 1
    except KeyError:  # of a map
        raise ValueError(
            f"data {str(path)!r}: one of the {BATCH_ROWS} rows from row {number} (from 0) has a map with "
            f"two equal keys; remove one"
        ) from None
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"data {str(path)!r} can't be read as parquet: {str(error).rstrip(' .')}; write it anew"
        ) from error


def read_jsonl(path: Path, file: BinaryIO) -> Iterator[SourceRow]:
    """One JSON object a line; empty lines hold no row."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield SourceRow(
                place, _object(place, _parsed(place, line, "a line must be one object"))
            )


def read_json(path: Path, file: BinaryIO) -> Iterator[SourceRow]:
    """A list of JSON objects; or, where it begins with an object, one object a line."""
    text = file.read()
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_jsonl(path, io.BytesIO(text))
        return
    rows = _parsed(str(path), text, "the file must be a list of objects")
    for number, values in enumerate(rows):
        place = f"{path}, row {number} (from 0)"
        yield SourceRow(place, _object(place, values))


def read_csv(path: Path, file: BinaryIO) -> Iterator[SourceRow]:
    """A first line of names, and rows of texts; an empty cell holds null."""
    csv.field_size_limit(MOST_CELL_CHARACTERS)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    line = 1
    try:
        names = next(reader, [])
        check_names(f"{path}, line 1", names)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            place = f"{path}, line {line}"
            if len(cells) != len(names):
                raise ValueError(
                    f"{place}: {len(cells)} cells, and the first line has {len(names)}; correct the row "
                    '(text with commas or quotes stands in quotes, and a quote in it is "")'
                )
            yield SourceRow(
                place, {name: cell or None for name, cell in zip(names, cells, strict=True)}
            )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}: not UTF-8 text ({error}); save the file as "
            "UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: {error}; correct the row (a quote in quoted text is "
            '"", without a backslash)'
        ) from error


FORMATS: dict[str, Callable[[Path, BinaryIO], Iterator[SourceRow]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "csv": read_csv,
}
"""Suffix -> reader."""


def check_names(place: str, names: Sequence[str]) -> None:
    """A ValueError for two columns of one name, of which a row could keep one only."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"{place}: two columns are called {twice!r}; rename or remove one")


class RepeatedName(Exception):
    """A JSON object with two entries of one name; the message says which."""


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedName(f"an object has {twice!r} twice; rename or remove one")
    return entries


def _parsed(place: str, text: bytes, rule: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_entries)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        start = repr(text[:60].decode("utf-8", errors="replace"))
        raise ValueError(
            f"{place}: not valid JSON: {error.msg} at character {error.pos + 1} of {start}; {rule}"
        ) from error
    except RepeatedName as error:
        raise ValueError(f"{place}: {error}") from None
    except ValueError as error:  # an integer of more than 4300 digits
        problem = str(error).partition(";")[0]
        raise ValueError(f"{place}: {problem}; store the number as text") from error
    except RecursionError as error:
        raise ValueError(f"{place}: JSON that is nested too deeply; flatten it") from error


def _object(place: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(
            f"{place}: {kind_of(values)}, not a JSON object; write {{column: value, ...}}"
        )
    return values
