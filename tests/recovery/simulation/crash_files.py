"""A file system in memory with a crash model, with the part of pathlib.Path that checkpoints use.

A kill loses nothing that was written. A power cut loses what was not synced: of a directory, the
last of its new, renamed, and removed names; of a file, its new bytes, which may be there, missing,
cut short, or wrong.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(slots=True, eq=False)
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass(slots=True, eq=False)
class Directory:
    entries: dict[str, File | Directory] = field(default_factory=dict)
    synced: dict[str, File | Directory] = field(default_factory=dict)
    history: list[dict[str, File | Directory]] = field(default_factory=list)
    """The entries after each change that was not synced yet."""

    def changed(self) -> None:
        self.history.append(dict(self.entries))

    def sync(self) -> None:
        self.synced, self.history = dict(self.entries), []


class CrashFiles:
    """files = CrashFiles(); store = CheckpointStore(SimulatedPath(files, "/run"), disk=files)"""

    def __init__(self) -> None:
        self.root = Directory()
        self.operations = 0
        self.full = False
        self.before_operation: Callable[[int], None] = lambda number: None
        """Called before each change with its number; it may raise in place of the change."""
        self.sync_directories = True
        self.sync_files = True

    def change(self, *, grows: bool = False) -> None:
        self.operations += 1
        self.before_operation(self.operations)
        if grows and self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def power_cut(self, chance: random.Random) -> None:
        self._cut(self.root, chance)

    def _cut(self, directory: Directory, chance: random.Random) -> None:
        survived = chance.randint(0, len(directory.history))
        if survived:
            directory.entries = dict(directory.history[survived - 1])
        else:
            directory.entries = dict(directory.synced)
        directory.sync()
        for node in directory.entries.values():
            if isinstance(node, Directory):
                self._cut(node, chance)
            elif node.data != node.synced:
                node.data = _after_power_cut(node, chance)
                node.synced = node.data

    # What CheckpointStore does to files besides the methods of a path.

    def write_synced(self, path: SimulatedPath, text: str) -> None:
        path.write_bytes(text.encode())
        self.sync_file(path)

    def sync_file(self, path: SimulatedPath) -> None:
        self.change()
        if self.sync_files:
            file = path.file()
            file.synced = file.data

    def sync(self, path: SimulatedPath) -> None:
        self.change()
        if self.sync_directories:
            path.directory().sync()

    def remove(self, path: SimulatedPath) -> None:
        directory = path.directory()
        for name in list(directory.entries):
            self.change()
            node = directory.entries[name]
            if isinstance(node, Directory):
                self.remove(path / name)
                continue
            del directory.entries[name]
            directory.changed()
        self.change()
        del path.holder().entries[path.name]
        path.holder().changed()

    def digests(self, path: SimulatedPath, names: list[str], *, sync: bool) -> dict[str, Any]:
        digests = {}
        for name in names:
            file = (path / name).file()
            if sync:
                self.sync_file(path / name)
            digest = hashlib.blake2b(file.data).hexdigest()[:32]
            digests[name] = {"bytes": len(file.data), "blake2b": digest}
        return digests


def _after_power_cut(file: File, chance: random.Random) -> bytes:
    """What was appended to synced bytes is in danger, or the whole of a file written anew."""
    safe = file.synced if file.data.startswith(file.synced) else b""
    torn = safe + _torn(file.data[len(safe) :], chance)
    return chance.choice([file.data, file.synced, torn])


def _torn(data: bytes, chance: random.Random) -> bytes:
    cut = data[: chance.randint(0, len(data))]
    if chance.random() < 0.5 or not cut:
        return cut
    place = chance.randrange(len(cut))
    return cut[:place] + bytes([cut[place] ^ 1]) + cut[place + 1 :]


class SimulatedPath:
    """A path in CrashFiles."""

    __slots__ = ("files", "name", "parts")

    def __init__(self, files: CrashFiles, path: str | tuple[str, ...]) -> None:
        parts = path
        if isinstance(parts, str):
            parts = tuple(part for part in parts.split("/") if part)
        self.files, self.parts = files, parts
        self.name = parts[-1] if parts else ""

    def __truediv__(self, name: str) -> SimulatedPath:
        return SimulatedPath(self.files, (*self.parts, *name.split("/")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedPath) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __str__(self) -> str:
        return "/" + "/".join(self.parts)

    def __lt__(self, other: SimulatedPath) -> bool:
        return self.parts < other.parts

    def absolute(self) -> SimulatedPath:
        return self

    def relative_to(self, other: SimulatedPath) -> str:
        return "/".join(self.parts[len(other.parts) :])

    def node(self) -> File | Directory | None:
        node: File | Directory | None = self.files.root
        for part in self.parts:
            if not isinstance(node, Directory):
                return None
            node = node.entries.get(part)
        return node

    def file(self) -> File:
        node = self.node()
        if not isinstance(node, File):
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
        return node

    def directory(self) -> Directory:
        node = self.node()
        if not isinstance(node, Directory):
            raise FileNotFoundError(errno.ENOENT, "No such directory", str(self))
        return node

    @property
    def parent(self) -> SimulatedPath:
        return SimulatedPath(self.files, self.parts[:-1])

    def holder(self) -> Directory:
        """The directory that holds its name."""
        node: File | Directory | None = self.files.root
        for part in self.parts[:-1]:
            if not isinstance(node, Directory):
                break
            node = node.entries.get(part)
        if not isinstance(node, Directory):
            raise FileNotFoundError(errno.ENOENT, "No such directory", str(self))
        return node

    def exists(self) -> bool:
        return self.node() is not None

    def is_dir(self) -> bool:
        return isinstance(self.node(), Directory)

    def is_file(self) -> bool:
        return isinstance(self.node(), File)

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self.file().data))

    def glob(self, pattern: str) -> Iterator[SimulatedPath]:
        node = self.node()
        if isinstance(node, Directory):
            for name in sorted(node.entries):
                if fnmatch.fnmatchcase(name, pattern):
                    yield self / name

    def rglob(self, pattern: str) -> Iterator[SimulatedPath]:
        for path in self.glob(pattern):
            yield path
            yield from path.rglob(pattern)

    def read_bytes(self) -> bytes:
        return self.file().data

    def read_text(self) -> str:
        return self.file().data.decode("utf-8", "replace")

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        if self.exists():
            if exist_ok:
                return
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        if parents and len(self.parts) > 1:
            SimulatedPath(self.files, self.parts[:-1]).mkdir(parents=True, exist_ok=True)
        self.files.change(grows=True)
        parent = self.holder()
        parent.entries[self.name] = Directory()
        parent.changed()

    def write_bytes(self, data: bytes) -> None:
        self.files.change(grows=True)
        parent = self.holder()
        file = parent.entries.get(self.name)
        if not isinstance(file, File):
            file = File()
            parent.entries[self.name] = file
            parent.changed()
        file.data = data

    def rename(self, target: SimulatedPath) -> SimulatedPath:
        node = target.node()
        if isinstance(node, Directory) and node.entries:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(target))
        return self.replace(target)

    def with_name(self, name: str) -> SimulatedPath:
        return SimulatedPath(self.files, (*self.parts[:-1], name))

    def hardlink_to(self, target: SimulatedPath) -> None:
        if self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        self.files.change()
        self.holder().entries[self.name] = target.file()
        self.holder().changed()

    def unlink(self) -> None:
        self.files.change()
        del self.holder().entries[self.name]
        self.holder().changed()

    def replace(self, target: SimulatedPath) -> SimulatedPath:
        """Into another directory it is two changes, of which a power cut may leave either."""
        self.files.change()
        parent, receiver = self.holder(), target.holder()
        if self.name not in parent.entries:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
        receiver.entries[target.name] = parent.entries.pop(self.name)
        parent.changed()
        if receiver is not parent:
            receiver.changed()
        return target

    def iterdir(self) -> Iterator[SimulatedPath]:
        return self.glob("*")
