"""check_weight_files(): whether a model's weights are all there, by their sizes and headers; no weights
are read.

Leaves out directories without any weights: a plan needs a config.json only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SAFETENSORS = ("model.safetensors", "adapter_model.safetensors")
BIN = ("pytorch_model.bin", "adapter_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
POINTER = b"version https://git-lfs"
LENGTH_BYTES = 8
"""A safetensors file begins with its header's length, little-endian, then the header as JSON and
the numbers (https://github.com/huggingface/safetensors)."""
FIX = "copy or download the file again"


def check_weight_files(path: str, setting: str, directory: Path | None = None) -> None:
    """A ValueError with the setting's name, the file and what is wrong with it. `directory`: where the
    files of the hub's name `path` are (hub.local_directory)."""
    directory = directory or Path(path)
    if not directory.is_dir():
        return
    for file in _weight_files(directory):
        problem = _problem(file)
        if problem:
            raise ValueError(f"{setting} is {path!r}: {file.name} {problem}")


def model_files(directory: Path) -> Iterator[Path]:
    """Those that transformers reads, in its order: one file goes before an index, which comes before
    the files that it names, and safetensors before pickles."""
    for whole, index in zip((SAFETENSORS[0], BIN[0]), INDEX, strict=True):
        if (directory / whole).is_file():
            yield directory / whole
            return
        if (directory / index).is_file():
            yield directory / index
            if not _problem(directory / index):
                weights = json.loads((directory / index).read_text())["weight_map"]
                for name in dict.fromkeys(weights.values()):
                    yield directory / name
            return


def has_all_weights(directory: Path) -> bool:
    """Whether there is a file of weights, and every file that an index names."""
    files = list(model_files(directory))
    return bool(files) and all(map(Path.is_file, files))


def _weight_files(directory: Path) -> Iterator[Path]:
    """Those that transformers and peft read."""
    yield from model_files(directory)
    for name in (SAFETENSORS[1], BIN[1]):
        if (directory / name).is_file():
            yield directory / name
            return


def _problem(file: Path) -> str:
    """In words, with the fix; empty where nothing is wrong."""
    if not file.is_file():
        return f"is missing, but the model's index names it; {FIX}"
    size = file.stat().st_size
    if not size:
        return f"is empty; {FIX}"
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        return "is a pointer of Git LFS, not the weights; run git lfs pull in its directory"
    if file.suffix == ".json":
        return _index_problem(file)
    return _header_problem(file, size) if file.suffix == ".safetensors" else ""


def _index_problem(file: Path) -> str:
    try:
        weights = json.loads(file.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        return f"is no index of weights; {FIX}"
    return "" if isinstance(weights, dict) else f"is no index of weights; {FIX}"


def _header_problem(file: Path, size: int) -> str:
    """Whether the file is as long as its header says."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        begin = LENGTH_BYTES + length
        if size < LENGTH_BYTES or begin > size:
            return f"is damaged: its {size:,} bytes end within the header; {FIX}"
        header = opened.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"is damaged: its header can't be read; {FIX}"
    needed = begin + max(ends, default=0)
    if needed != size:
        return f"is damaged: it has {size:,} bytes, and its header says {needed:,}; {FIX}"
    return ""
