'''Programs that the policy writes, run in the sandbox (workers/rewards/sandbox) for a tool or an
environment.

    class Interpreter:
        def python(self, program: str) -> str:
            """Runs Python and returns what it prints.

            Args:
                program: The program, which sees no files, no network and no earlier program.
            """
            return run_python(program)

Leaves out sessions: every program is a process of its own, with an empty directory. Other languages
want a sandbox of their own.
'''

from __future__ import annotations

from threading import BoundedSemaphore

from workers.rewards.sandbox import Limits, run

SIDE_BY_SIDE = BoundedSemaphore(64)
"""Programs that run at a time, however many episodes there are."""
AROUND = """
import linecache as _lines, sys as _sys, traceback as _traceback
_sys.stderr = _sys.stdout
_source = {program!r}
_lines.cache["<program>"] = len(_source), None, _source.splitlines(keepends=True), "<program>"
try:
    exec(compile(_source, "<program>", "exec"))
except SystemExit as _end:
    if not isinstance(_end.code, int | None):
        print(_end.code)
except BaseException as _error:
    _traceback.print_exception(_error.with_traceback(_error.__traceback__.tb_next))
"""
"""Runs the program so that what it says of its errors can be read."""


def run_python(
    program: str,
    stdin: str = "",
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    most_characters: int = 4000,
) -> str:
    """Runs a Python program, and returns text for the policy to read: all that it prints, its errors
    included, and whether it was ended. It blocks: call it in a plain method, or with asyncio.to_thread.

    timeout_s: by the clock, without the time that it waits for a busy processor. A SandboxError, by
    which an episode fails, where the sandbox does not hold.
    """
    with SIDE_BY_SIDE:
        limits = Limits(timeout_s=timeout_s, memory_mb=memory_mb)
        ended, written = run(AROUND.format(program=program), stdin, limits)
    if len(written) > most_characters:
        written = f"{written[:most_characters]}\n... ({len(written)} characters)\n"
    if not ended:
        written += (
            f"The program crashed, or was ended: it may take {timeout_s:g} s and {memory_mb} MiB.\n"
        )
    return written
