"""Ledger: one line for every committed step: which rows it used, and the digest of every trained
role after it.

    {"step": 7, "rows": {"count": 64, "digest": "..."}, "position": {...}, "chain": "...",
     "roles": {"actor": {"digest": "9f0c...", "tensors": "one group of 8 digits for each"}}}

Two runs with equal lines have trained on the same rows in the same order and hold the same weights
and moments, bit for bit, whatever their layouts. `chain` is a digest of this line and all before
it. The file ledger.jsonl is a projection: the commit of a step holds its line, so that a crash
between the two loses nothing. A line that names "tensors" lists them for the lines that follow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridflow.batch import Batch
from hybridflow.disk import DISK, LineFile
from hybridflow.snapshots.files import DIGEST_DIGITS, Written

LOGGER = logging.getLogger(__name__)
LEDGER = "ledger.jsonl"
TENSOR_DIGITS = 8
"""Hexadecimal digits that tell a tensor's digest in a line; the role's digest is whole."""
Line = dict[str, Any]


class Rows:
    """The rows that were used since the last commit, in order."""

    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=8)
        self._passed_over = hashlib.blake2b(digest_size=8)
        self.count = self.num_passed_over = 0

    def add(self, batch: Batch) -> None:
        """Counts a step's rows; they are told apart by uid and sample, where they have them."""
        self.count += len(batch)
        for name in ("uid", "sample"):
            if name in batch:
                self._hasher.update(batch.tensor(name).numpy().tobytes())

    def pass_over(self, batch: Batch) -> None:
        """Counts rows that no step trains on, because their gradient was not finite."""
        self.num_passed_over += len(batch)
        self._passed_over.update(batch.tensor("uid").numpy().tobytes())

    def line(self) -> Line:
        line: Line = {"count": self.count, "digest": self._hasher.hexdigest()}
        if self.num_passed_over:
            line["passed_over"] = {
                "count": self.num_passed_over,
                "digest": self._passed_over.hexdigest(),
            }
        return line


class Ledger:
    """ledger = Ledger(Path("outputs/ppo/ledger.jsonl"))
    line = ledger.next(7, rows, position, {"actor": written})     # goes into the commit
    ledger.append(line)                                           # once that is done
    ledger.rewind(line)                                           # on resume, with the commit's line
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LineFile(path)
        self.last: Line | None = None
        self.unwritten: list[Line] = []
        """Lines that wait for room on a full disk; a commit in memory holds them too."""
        self.names: dict[str, tuple[str, ...]] = {}
        """Each role's tensors."""

    def next(
        self, step: int, rows: Rows, position: Mapping[str, Any], roles: Mapping[str, Written]
    ) -> Line:
        """The line that follows the last one; written nowhere yet."""
        of_roles = {name: role_line(written) for name, written in roles.items()}
        line: Line = {"step": step, "rows": rows.line(), "position": dict(position)}
        line["roles"] = of_roles
        names = {name: written.names for name, written in roles.items()}
        if names != self.names:
            line["tensors"] = {name: list(of_role) for name, of_role in names.items()}
        line["chain"] = _chain(self.last["chain"] if self.last else "", line)
        return line

    def append(self, line: Line) -> None:
        """Adds the line to the file. On a full disk it waits for room; the commit has it too."""
        self._file.append(json.dumps(line))
        self.unwritten = [*self.unwritten, line] if self._file.is_waiting else []
        self._take(line)

    def sync(self) -> None:
        """Sees to it that a power cut leaves the lines so far; before every commit on disk, which
        holds its own line alone. An OSError where the disk has no room for them."""
        self._file.write()
        self.unwritten = []
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            DISK.sync(self.path.parent)

    def rewind(self, last: Line | None, unwritten: Sequence[Line] = ()) -> None:
        """Cuts the file behind the line `last`, and writes that line where it is missing; None:
        removes the file. On a full disk the new file waits for room. `unwritten`: the lines before
        `last` that the disk had no room for when that was committed."""
        if last is None:
            self.path.unlink(missing_ok=True)
            self._file = LineFile(self.path)
            self.last, self.unwritten, self.names = None, [], {}
            return
        first = unwritten[0]["step"] if unwritten else last["step"]
        kept = []
        for line in _lines(self._file.text(), self.path):
            if line["step"] < first:
                kept.append(line)
        kept += unwritten
        # A resumed run may start in another directory, with no ledger yet.
        whole = bool(kept) and _chain(kept[-1]["chain"], last) == last["chain"]
        if not whole and last["chain"] != _chain("", last):
            LOGGER.warning("%s: lines before step %d are missing", self.path, last["step"])
        self._file.rewrite(map(json.dumps, (*kept, last)))
        self.unwritten = [*kept, last] if self._file.is_waiting else []
        self.names = {}
        for line in (*kept, last):
            self._take(line)

    def _take(self, line: Line) -> None:
        self.last = line
        if "tensors" in line:
            self.names = {name: tuple(of_role) for name, of_role in line["tensors"].items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first place where two ledgers differ."""

    step: int
    what: str
    """"rows", "position", "steps" (one ledger has it, the other not), or a role's tensor:
    "actor: exp_avg.model.norm.weight"."""

    def __str__(self) -> str:
        return f"step {self.step} differs in {self.what}"


def first_difference(first: Path, second: Path) -> Difference | None:
    """Compares two ledgers step by step; None where the steps that both have are equal and both
    have the same."""
    ours, theirs = (_by_step(path) for path in (first, second))
    for step in sorted(ours.keys() | theirs.keys()):
        if step not in ours or step not in theirs:
            return Difference(step=step, what="steps")
        line, names = ours[step]
        other, _ = theirs[step]
        what = line_difference(line, other, names)
        if what:
            return Difference(step=step, what=what)
    return None


def line_difference(line: Line, other: Line, names: Mapping[str, tuple[str, ...]]) -> str:
    """Difference.what of two lines of one step, "" where they are equal; `names`: each role's
    tensors."""
    for what in ("rows", "position"):
        if line[what] != other[what]:
            return what
    for role in sorted(line["roles"].keys() | other["roles"].keys()):
        a, b = line["roles"].get(role), other["roles"].get(role)
        if a != b:
            return f"{role}: {_tensor(a, b, names.get(role, ()))}"
    return ""


def line_digest(line: Line) -> str:
    """A digest of the rows that a step used and of all roles after it; empty where the line has
    none of the roles, because the step was not staged in memory."""
    if not line["roles"]:
        return ""
    digests = {name: of_role["digest"] for name, of_role in line["roles"].items()}
    text = json.dumps([line["rows"], digests], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_ledger(path: Path) -> list[Line]:
    """The lines of a ledger up to the first that a crash or a power cut damaged: that is cut off,
    or is not the one that its chain says. A ledger that begins in another directory starts with
    any chain."""
    if not path.exists():
        return []
    return _lines(path.read_text(errors="replace"), path)


def _lines(whole: str, path: Path) -> list[Line]:
    """`whole`: the text of a ledger; `path`: for the log."""
    lines: list[Line] = []
    for text in whole.splitlines(keepends=True):
        try:
            line = json.loads(text)
            follows = not lines or line["chain"] == _chain(lines[-1]["chain"], line)
        except (ValueError, KeyError, TypeError):
            follows = False
        if not follows or not text.endswith("\n"):
            LOGGER.warning("%s: line %d and what follows is damaged", path, len(lines) + 1)
            break
        lines.append(line)
    return lines


def role_line(written: Written) -> dict[str, str]:
    """A role's part of a line."""
    total = int(written.digests.sum(dtype=np.uint64))
    tensors = [f"{int(digest):0{DIGEST_DIGITS}x}"[:TENSOR_DIGITS] for digest in written.digests]
    return {"digest": f"{total:0{DIGEST_DIGITS}x}", "tensors": "".join(tensors)}


def _by_step(path: Path) -> dict[int, tuple[Line, dict[str, tuple[str, ...]]]]:
    """Every line with the tensors' names that hold for it."""
    names: dict[str, tuple[str, ...]] = {}
    lines = {}
    for line in read_ledger(path):
        if "tensors" in line:
            names = {name: tuple(of_role) for name, of_role in line["tensors"].items()}
        lines[line["step"]] = (line, names)
    return lines


def _tensor(a: dict[str, str] | None, b: dict[str, str] | None, names: tuple[str, ...]) -> str:
    """The first tensor that differs."""
    if a is None or b is None or len(a["tensors"]) != len(b["tensors"]):
        return "its tensors"
    for number, name in enumerate(names):
        at = slice(number * TENSOR_DIGITS, (number + 1) * TENSOR_DIGITS)
        if a["tensors"][at] != b["tensors"][at]:
            return name
    return "its digest"


def _chain(before: str, line: Line) -> str:
    content = {name: value for name, value in line.items() if name != "chain"}
    text = json.dumps([before, content], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
