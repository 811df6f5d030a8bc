"""A small file system for a run's directory, and filling it to the last byte for a while."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = "96m"
"""Room for two checkpoints and the export of the tiny model."""
FILLER = ".filler"
BLOCK = bytes(1 << 16)


def may_mount() -> bool:
    """Whether this user may mount a file system here."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            mount(Path(directory))
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(directory))
    return True


def mount(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(directory)]
    subprocess.run(command, check=True, capture_output=True)


def unmount(directory: Path, keep: bool = False) -> None:
    """`keep`: what the file system holds stays in the directory."""
    copy = directory.with_name(f"{directory.name}.kept")
    if keep:
        shutil.copytree(directory, copy)
    subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)
    if keep:
        directory.rmdir()
        copy.rename(directory)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """Nothing can be written to the file system of `directory` inside."""
    filler = directory / FILLER
    try:
        with filler.open("wb", buffering=0) as file:
            block = BLOCK
            while block:  # until the disk refuses a single byte
                try:
                    file.write(block)
                except OSError:
                    block = block[: len(block) // 2]
        yield
    finally:
        filler.unlink(missing_ok=True)
