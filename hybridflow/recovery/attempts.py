"""Attempt: a number for every life of a controller, the token that decides who may write.

A controller that takes a run over, because the one before it died or is thought to have died, makes
a directory attempts/<n> in the run's output directory. mkdir is atomic, on network file systems
too, so no two controllers get one number. Whoever finds a higher number than its own has been
replaced: it writes nothing more.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from hybridflow.disk import DISK, Disk

DIRECTORY = "attempts"
RUN = "run"
"""File with the run's id, which is another one once the output directory was removed."""


class Fenced(RuntimeError):
    """A newer attempt has taken the run over; this one must end without writing."""


class Attempt:
    """attempt = Attempt.claim(Path("outputs/ppo"))      # from here on the earlier ones are fenced
    attempt.check()                                   # before every commit, prune and cut of a file
    """

    def __init__(self, directory: Path, number: int, run: str) -> None:
        self.directory = directory
        """attempts/ of the run."""
        self.number = number
        self.run = run
        """Random text that is the same in every attempt of the run."""

    @classmethod
    def claim(cls, output_dir: Path, disk: Disk = DISK, *, after: int | None = None) -> Attempt:
        """The newest attempt of the run in `output_dir`; its number is on disk, and so never another
        attempt's. disk: how names are synced. after: the attempt that this one goes on with; Fenced
        where another one has done so already."""
        directory = output_dir.absolute() / DIRECTORY
        if after is not None:
            cls(directory, after, "").check()
        directory.mkdir(parents=True, exist_ok=True)
        disk.sync(directory.parent)
        with suppress(PermissionError):  # a directory that this user may enter, not read
            disk.sync(directory.parent.parent)
        file = directory / RUN
        if not file.exists():
            # A name that nobody else uses, then a link: the file is never there in part.
            draft = directory / f".{RUN}-{secrets.token_hex(8)}"
            disk.write_synced(draft, secrets.token_hex(8))
            try:
                file.hardlink_to(draft)
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        while True:
            number = newest(directory) + 1
            try:
                (directory / str(number)).mkdir()
            except FileExistsError:
                continue
            disk.sync(directory)
            return cls(directory, number, file.read_text())

    def check(self) -> None:
        """Raises Fenced where a higher attempt exists, or the output directory is gone."""
        last = newest(self.directory)
        if last < self.number:
            raise Fenced(
                f"output_dir={self.directory.parent}: the run was removed; attempt {self.number} ends "
                "without writing anything more"
            )
        if last > self.number:
            raise Fenced(
                f"output_dir={self.directory.parent}: attempt {last} has taken this run over; "
                f"attempt {self.number} ends without writing anything more"
            )


def newest(directory: Path) -> int:
    """The highest number in attempts/; 0 where there is none."""
    numbers = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return max(numbers, default=0)
