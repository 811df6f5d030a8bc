"""How every command of recipes/ ends where something is wrong: in one line on stderr, and
status 2 or 1."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridflow.errors import WorkerDied, WorkerError, WorkerStuck

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable: 1 shows the whole stack in place of one line."""
ERROR_FILE = "error.txt"


def no_directory() -> Path | None:
    return None


@contextmanager
def plain_errors(directory: Callable[[], Path | None] = no_directory) -> Iterator[None]:
    """Turns errors that are no bug of ours into one line and an exit status.

    A ValueError is the user's mistake: its message is what they need (status 2). A worker's error,
    death or standstill is told by its first line; the rest, with the remote traceback, goes into
    error.txt in `directory()` (status 1). Anything else keeps its stack, as does everything with
    HYDRA_FULL_ERROR=1.
    """
    try:
        yield
    except (ValueError, WorkerError, WorkerDied, WorkerStuck) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        if isinstance(error, WorkerError | WorkerDied | WorkerStuck):
            print(
                f"error: {first_line(error)}; {where_details_are(error, directory())}",
                file=sys.stderr,
            )
            raise SystemExit(1) from None
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(" ;:")


def where_details_are(error: BaseException, directory: Path | None) -> str:
    """Writes the whole error with its stack to `directory`, where there is one, and says where
    it is."""
    if directory is None:
        return f"{FULL_ERROR}=1 shows the details"
    path = directory / ERROR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)))
    return f"details: {path}"
