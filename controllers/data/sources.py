"""Where rows come from: files, directories, globs and hub datasets, several of them with weights;
each row with its place for error messages.

Leaves out how files are read (files.py) and what the rows mean (tokenize.py, messages.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controllers.data.files import FORMATS, SourceRow, format_of, read_file
from workers.hub import offline_without_the_hub

__all__ = ["READ_ROWS", "Source", "SourceRow", "read", "sources"]

LOGGER = logging.getLogger(__name__)

READ_ROWS = 1024
"""Rows that are read and tokenised at a time."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:([^:\[\]]|\[[^\]]*\])+){0,2}")
"""owner/name, owner/name:split or owner/name:config:split."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words that name it in a file's name, as in train-00000-of-00002.parquet."""


@dataclass(frozen=True, slots=True)
class Source:
    """Source("train.jsonl", weight=3.0); no weight: every row as often as every other."""

    place: str
    weight: float | None = None


def sources(field: str, value: Any) -> list[Source]:
    """One place or several, as texts or as {path, weight}; `field` is the setting's name."""
    listed = value
    if isinstance(value, str | dict):
        listed = [value]
    if not isinstance(listed, Sequence) or not listed:
        raise ValueError(_not_places(field, value))
    return [_source(field, item) for item in listed]


def _source(field: str, item: Any) -> Source:
    if isinstance(item, Source):
        return item
    if isinstance(item, str) and item:
        return Source(item)
    if not isinstance(item, dict) or not isinstance(item.get("path"), str) or not item["path"]:
        raise ValueError(_not_places(field, item))
    unknown = [name for name in item if name not in ("path", "weight")]
    if unknown:
        raise ValueError(f"{field} has {unknown[0]!r} in {item}; write {{path: ..., weight: ...}}")
    weight = item.get("weight")
    if weight is None:
        return Source(item["path"])
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ValueError(f"{field} has weight {weight!r} in {item}; use a number over 0")
    return Source(item["path"], float(weight))


def _not_places(field: str, value: Any) -> str:
    return (
        f"{field} is {value!r}; give a file, a hub name, or a list of them, each as text or as "
        "{path: ..., weight: ...}"
    )


def read(place: str, field: str = "data.train") -> Iterator[SourceRow]:
    """All rows of a place, in order; `field` is the setting that names it."""
    path = Path(place).expanduser()
    if path.exists():
        if path.is_dir():
            yield from _read_directory(path, place, field)
        else:
            yield from read_file(path)
        return
    directory, _, rest = place.partition(":")
    is_split = bool(rest) and Path(directory).expanduser().is_dir()
    if is_split or (HUB_NAME.fullmatch(place) and format_of(path) is None):
        yield from read_hub(place)
    elif set(place) & set("*?["):
        for file in _globbed(path, place):
            yield from read_file(file)
    elif _looks_like_a_file(path, place):
        raise ValueError(
            f"data {place!r}: there is no such file (working directory {Path.cwd()}); give an "
            "existing path or a hub name"
        )
    else:
        yield from read_hub(place)


def _looks_like_a_file(path: Path, place: str) -> bool:
    suffixes = ("." + suffix for suffix in (*FORMATS, "txt"))
    return (
        format_of(path) is not None
        or place.lower().endswith(tuple(suffixes))
        or path.is_absolute()
        or place.startswith((".", "~"))
    )


def _globbed(path: Path, place: str) -> list[Path]:
    files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not files:
        raise ValueError(f"data {place!r}: no file has such a name; correct the pattern")
    return files


def _read_directory(path: Path, place: str, field: str) -> Iterator[SourceRow]:
    """The directory's files; where their names tell splits, those of one split."""
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        yield from _numbered(place, _saved(path))
        return
    if (path / "dataset_dict.json").is_file():
        names = sorted(child.name for child in path.iterdir() if child.is_dir())
        yield from _numbered(place, _saved(path / _chosen(names, place, field)))
        return
    files = data_files(path)
    if not files:
        known = ", ".join(f".{suffix}" for suffix in FORMATS)
        raise ValueError(
            f"data {place!r}: no file there, nor in a folder data/ of it, ends in {known} "
            "(compressed or not)"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative_to(path)), []).append(file)
    chosen = files
    if len(splits) > 1:
        chosen = splits[_chosen(sorted(splits), place, field)]
    for file in chosen:
        yield from read_file(file)


def data_files(directory: Path) -> list[Path]:
    """The files of rows in a directory, or else in its folder data/, sorted."""
    for place in (directory, directory / "data"):
        if place.is_dir():
            files = [child for child in place.iterdir() if _has_rows(child)]
            if files:
                return sorted(files)
    return []


def _has_rows(file: Path) -> bool:
    """Whether it is a file of rows: not a hidden one, nor what the hub has about a data set."""
    about = file.name in ("dataset_info.json", "dataset_infos.json")
    return format_of(file) is not None and file.is_file() and file.name[0] != "." and not about


def split_of(file: Path) -> str:
    """The split that a file's name tells, "" if none: train for train-00000-of-00001.parquet."""
    words = re.split(r"[^a-z]+", file.name.lower())
    for split, names in SPLITS.items():
        if set(words) & set(names):
            return split
    return ""


def _chosen(splits: Sequence[str], place: str, field: str) -> str:
    """The split to read of several: train for data.train; elsewhere it must be named."""
    if field == "data.train" and "train" in splits:
        others = ", ".join(name or "others" for name in splits if name != "train")
        LOGGER.info("data.train %s: its split train is read, not %s", place, others)
        return "train"
    names = [name or "files without a split's name" for name in splits]
    fix = f"{place}:{next(name for name in splits if name)}"
    raise ValueError(
        f"{field} {place!r}: a directory with the splits {', '.join(names)}; name one, as in "
        f"{field}={fix}, or give its files"
    )


def read_hub(place: str) -> Iterator[SourceRow]:
    """owner/name[:config][:split], through `datasets` (its cache, its mirrors, its offline mode);
    a split may be cut (train[:10], train[10%:20%]). A directory in place of owner/name too."""
    import datasets

    name, *rest = place.split(":", maxsplit=1)
    config, split = None, "train"
    if rest:
        config, split = _config_and_split(place, rest[0])
    path = Path(name).expanduser()
    if path.is_dir():
        name = str(path)
    try:
        with offline_without_the_hub(name):
            dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data {place!r} is neither a file nor a dataset that the hub gives us "
            f"({type(error).__name__}: {reason}); check the name, config and split, or the network"
        ) from error
    yield from _numbered(place, dataset)


def _config_and_split(place: str, rest: str) -> tuple[str | None, str]:
    """("main", "train[:10]") of main:train[:10], (None, "train[:10]") of train[:10]."""
    parts = re.fullmatch(r"(?:([^:\[\]]+):)?([^:\[\]]+(?:\[[^\]]*\])?(?:\+.+)?)", rest)
    if parts is None:
        raise ValueError(
            f"data {place!r}: write owner/name, owner/name:split or owner/name:config:split; a "
            "split may be cut, as in train[:10]"
        )
    return parts[1], parts[2]


def _saved(path: Path) -> Any:
    """A dataset that save_to_disk wrote."""
    import datasets

    return datasets.load_from_disk(str(path))


def _numbered(place: str, rows: Any) -> Iterator[SourceRow]:
    for number, values in enumerate(rows):
        yield SourceRow(f"{place}, row {number} (from 0)", values)
