"""How every command of recipes/ ends where something is wrong: in one line on stderr, and
status 2 or 1."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hybridflow.errors import (
    NotFiniteError,
    UserCodeError,
    WorkerDied,
    WorkerError,
    WorkerStuck,
)
from hybridflow.recovery.attempts import Fenced

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable: 1 shows the whole stack in place of one line."""
WORLDS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that are about the disk and its owner, not about a program."""
OF_WORKERS = (UserCodeError, NotFiniteError, WorkerError, WorkerDied, WorkerStuck)
"""Errors that end a command with status 1."""
ERROR_FILE = "error.txt"


def no_directory() -> Path | None:
    return None


def nothing_kept() -> str:
    return "interrupted"


@contextmanager
def plain_errors(
    directory: Callable[[], Path | None] = no_directory,
    interrupted: Callable[[], str] = nothing_kept,
) -> Iterator[None]:
    """Turns errors that are no bug of ours into one line and an exit status.

    A ValueError is the user's mistake: its message is what they need (status 2). A worker's error,
    death or standstill is told by its first line; the rest, with the remote traceback, goes into
    error.txt in `directory()` (status 1). Ctrl-C ends the process as it ends any program (130 in a
    shell), with the line `interrupted()`. Anything else keeps its stack, as does everything with
    HYDRA_FULL_ERROR=1.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get(FULL_ERROR) != "1":
            # In front of what torch.distributed put there, which marks every line with a rank.
            sys.excepthook = without_stack
            print(interrupted(), file=sys.stderr)
        raise
    except Fenced as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        end(one_line(error), 1)
    except (ValueError, *OF_WORKERS) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        if isinstance(error, OF_WORKERS):
            end(f"{first_line(error)}; {where_details_are(error, directory())}", 1)
        end(one_line(error), 2)
    except OSError as error:
        if os.environ.get(FULL_ERROR) == "1" or error.errno not in WORLDS:
            raise
        place = error.filename or "a file of output_dir"
        end(f"{place}: {error.strerror}; make room or give access, or set another output_dir", 1)


def without_stack(kind: type[BaseException], error: BaseException, stack: Any) -> None:
    """In the place of sys.excepthook: Ctrl-C was said in a line."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, stack)


@dataclass(slots=True)
class Ending:
    """How this process ends."""

    status: int = 0


ENDING = Ending()


def end(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    ENDING.status = status
    raise SystemExit(status) from None


def leave() -> None:
    """Ends a command that failed at once, after everything else that runs when Python exits.

    Some libraries count what they leak while Python takes itself apart (nanobind, in vLLM's
    structured output: some thirty lines), below the line that says what is wrong.
    """
    spec = sys.modules["__main__"].__spec__
    if ENDING.status and spec is not None and spec.name.partition(".")[0] == "recipes":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDING.status)


def one_line(error: BaseException) -> str:
    """The message; what it quotes of another library may have line breaks."""
    return " ".join(line.strip() for line in str(error).splitlines())


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
