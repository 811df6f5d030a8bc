"""JSON files that users write by hand: every mistake is a ValueError that names the file, the
field and the fix."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hybridflow.wording import kind_of


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads the object in a file; `what` names its kind in errors, for example "mapping"."""
    if not path.is_file():
        raise ValueError(f"{what} file {path} is not there; give the path of a JSON file")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} file {path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{what} file {path} holds {kind_of(content)}; it must be an object {{...}}"
        )
    return content


def checked(kind: type, content: Any, where: str) -> dict[str, Any]:
    """Checks that `content` can be the keyword arguments of the dataclass `kind`, none missing
    and none unknown; errors begin with `where`."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}; it must be an object {{...}}")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(content) - set(known))
    missing = []
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in content:
            missing.append(name)
    problems = []
    if unknown:
        problems.append(f"unknown {', '.join(unknown)}")
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; its fields are {', '.join(known)}")
    return content
