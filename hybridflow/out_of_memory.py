"""The kernel's out-of-memory killer: how often it has ended a process of this container, the limit that
it guards, and what of it is in use.

    before = read_kills()
    ...
    print(told(before, read_kills(), read_limit()))     # "" where it ended none

Reads the memory controller of cgroups, version 2 or 1, that this process is in; where there is none,
the counter of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60
"""Version 1 writes a number over this where there is no limit."""


def read_kills(root: Path = ROOT) -> int:
    """Processes that it has ended so far. `root`: where /proc and /sys are."""
    for directory in _directories(root):
        for name in ("memory.events", "memory.oom_control"):
            kills = _value(directory / name, "oom_kill")
            if kills is not None:
                return kills
    return _value(root / "proc" / "vmstat", "oom_kill") or 0


def read_limit(root: Path = ROOT) -> int:
    """Bytes that the container may take; 0: as many as there are."""
    for directory in _directories(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            file = directory / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text.isdigit() and int(text) < NO_LIMIT:
                return int(text)
    return 0


def read_used(root: Path = ROOT) -> int:
    """Bytes that the container has in use, without pages of files that nobody used lately, which the
    kernel takes back first; those of the machine where no container has a limit."""
    if read_limit(root):
        for directory in _directories(root):
            for name in ("memory.current", "memory.usage_in_bytes"):
                file = directory / name
                if file.is_file():
                    statistics = directory / "memory.stat"
                    idle = _value(statistics, "total_inactive_file")
                    if idle is None:
                        idle = _value(statistics, "inactive_file") or 0
                    return max(0, int(file.read_text()) - idle)
    sizes = root / "proc" / "meminfo"
    total, free = (_value(sizes, f"{name}:") for name in ("MemTotal", "MemAvailable"))
    return 1024 * ((total or 0) - (free or 0))


def told(before: int, now: int, limit_bytes: int) -> str:
    """In words: what it did between two readings; empty where it did nothing."""
    if now <= before:
        return ""
    limit = f", whose limit is {limit_bytes / 1e9:.3g} GB" if limit_bytes else ""
    return (
        f"out of memory: the kernel has killed {now - before} processes on its node since the pool "
        f"started{limit}; use smaller micro-batches, more devices, or more memory"
    )


def _directories(root: Path) -> Iterator[Path]:
    """Directories of the memory controller, this process' own first. In a container the path that
    the kernel names may be the host's, and the mount point is the container's own."""
    mounted = root / "sys" / "fs" / "cgroup"
    file = root / "proc" / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield mounted / path.lstrip("/")
            yield mounted
        elif "memory" in controllers.split(","):
            yield mounted / "memory" / path.lstrip("/")
            yield mounted / "memory"


def _value(file: Path, name: str) -> int | None:
    """The number in the line `name number` of a file; None where it has none."""
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        key, value, *_ = [*line.split(), "", ""]
        if key == name:
            return int(value)
    return None
