"""The first place where two runs differ: step, and rows, position in the data, or tensor.

    python -m recipes.diff outputs/a outputs/b

Reads the runs' ledgers, which have a digest of every tensor after each committed step, and says
which settings and versions differ. Ends with status 0 where the runs are equal bit for bit, 1 where
they differ, 2 where a directory is no run's. The rows' contents are not compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from controllers import algorithm_entry, algorithm_names
from controllers.ledger import LEDGER, first_difference, read_ledger
from recipes.errors import plain_errors
from recipes.settings_page import unread_names

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
ITS_PLACE = ("output_dir",)
"""Settings that no two runs share."""


def main() -> None:
    with plain_errors():
        sys.exit(compare(sys.argv[1:]))


def compare(arguments: Sequence[str]) -> int:
    """Prints what differs; returns the exit status."""
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if "--help" in arguments else 2
    first, second = map(Path, arguments)
    for run in (first, second):
        if not (run / LEDGER).is_file():
            raise ValueError(f"{run}: has no {LEDGER}, so it is no run's output_dir")
    for name, ours, theirs in different_settings(first, second):
        print(f"{name}: {ours} | {theirs}")
    difference = first_difference(first / LEDGER, second / LEDGER)
    if difference is None:
        print(f"equal: all {len(read_ledger(first / LEDGER))} committed steps, bit for bit")
        return 0
    print(difference)
    return 1


def different_settings(first: Path, second: Path) -> list[tuple[str, object, object]]:
    """(name, value in the first run, in the second) of every setting and version that differs."""
    ours, theirs = settings_of(first), settings_of(second)
    unread = unread_by(ours) & unread_by(theirs)
    different = []
    for name in sorted(ours.keys() | theirs.keys()):
        if any(f"{name}.".startswith(f"{group}.") for group in unread):
            continue
        if ours.get(name) != theirs.get(name) and name not in ITS_PLACE:
            different.append((name, ours.get(name), theirs.get(name)))
    return different


def unread_by(settings: Mapping[str, object]) -> set[str]:
    """Settings and groups of settings, of other algorithms' models for example, that the run did
    not read; none where its algorithm is not known here."""
    name = settings.get("algorithm.name")
    if name not in algorithm_names():
        return set()
    return set(unread_names(algorithm_entry(str(name))))


def settings_of(run: Path) -> dict[str, object]:
    """Settings by dotted name, and versions; what the run did not write is left out."""
    values: dict[str, object] = {}
    if (run / CONFIG).is_file():
        values |= flat(OmegaConf.to_container(OmegaConf.load(run / CONFIG)), "")
    if (run / ENVIRONMENT).is_file():
        values |= flat(json.loads((run / ENVIRONMENT).read_text()), "environment.")
    return values


def flat(value: Any, prefix: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            values |= flat(item, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = item
    return values


if __name__ == "__main__":
    main()
