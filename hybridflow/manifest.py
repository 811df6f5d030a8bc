"""The manifest of a checkpoint: what it says of itself, in the file that is written last.

    {"format": 2, "step": 20, "sequence": 2, "metrics": {"accuracy": 0.8},
     "files": {"actor/0.safetensors": {"bytes": 2181120, "blake2b": "9f0c..."}},
     "metadata": {...}, "checksum": "5e1d..."}

The files' contents are compared with it by load_metadata (checkpoint.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the manifest's fields and of the trained roles' files."""
CHECKSUM = "checksum"
FIX = "remove this directory to go on from the checkpoint before it"
KINDS = {"step": int, "sequence": int, "metrics": dict, "files": dict, "metadata": dict}


class DamagedManifest(ValueError):
    """A manifest that is not what was written."""


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it is written."""
    return {**manifest, CHECKSUM: checksum(manifest)}


def checksum(manifest: Mapping[str, Any]) -> str:
    """A digest of everything else that the manifest says."""
    fields = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=8).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint says of itself. A FileNotFoundError without it, a DamagedManifest for one
    that is not what was written, a ValueError for that of another version."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise DamagedManifest(
            f"checkpoint {path}: {MANIFEST} is corrupt ({error}); {FIX}"
        ) from error
    if number != FORMAT:
        raise ValueError(
            f"checkpoint {path}: format {number}, this version reads {FORMAT}; go on with the "
            "version that wrote it, or start a new run from its huggingface directory"
        )
    if problem := _problem(manifest):
        raise DamagedManifest(f"checkpoint {path}: {MANIFEST} is corrupt ({problem}); {FIX}")
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str:
    """In words: the field that is not what was written; empty where all are. A manifest of an earlier
    version has no checksum."""
    for name, kind in KINDS.items():
        if not isinstance(manifest.get(name), kind):
            return f"{name} is of type {type(manifest.get(name)).__name__}"
    if manifest.get(CHECKSUM, checksum(manifest)) != checksum(manifest):
        return "its checksum differs"
    return ""


def check_json(metadata: Mapping[str, Any]) -> None:
    """A ValueError for what JSON would not give back equal."""
    for name, value in metadata.items():
        try:
            survives = json.loads(json.dumps({name: value})) == {name: value}
        except TypeError as error:
            raise ValueError(f"checkpoint: metadata {name!r} is not JSON data: {error}") from error
        if not survives:
            raise ValueError(
                f"checkpoint: metadata {name!r} would not come back equal from JSON; use lists, "
                "string keys, finite floats"
            )
