"""Python programs that a model writes, run against tests. UNSAFE: there is no sandbox.

A program runs in a process of its own with limits on time, memory, files and output, in an empty
directory, without this process' environment and, where the kernel lets it, without a network. It
runs as the same user: it can read what that user can read, write where that user can write, and
with the right means get around the limits. Run models whose programs you would run yourself, or the
whole job in a container or virtual machine that may be lost.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
LAUNCHER = Path(__file__).with_name("code_launcher.py")
START_S = 1.0
"""Seconds for starting Python itself."""
LEAST_MEMORY_MB = 64
OUTPUT_BYTES = 2**20
"""The most that is compared of what a program writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    timeout_s: float
    memory_mb: int


def code(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    allow_unsafe: bool,
    timeout_s: float = 5.0,
    memory_mb: int = 1024,
    partial: bool = False,
    **columns: object,
) -> dict[str, float]:
    """1.0 if the program in the response passes all of its tests, else 0.0; with partial the
    share that it passes.

    answer: a list of {"input": text on stdin, "output": text on stdout}, {"inputs": [...],
    "outputs": [...]}, a list of assert statements, or Python that asserts; or the JSON text of one
    of them. The program is the last fenced block, or the whole response. timeout_s: seconds of each
    test by the clock, without those that it waits for a busy processor.

    A ValueError without allow_unsafe=true and for an answer without tests, a
    RuntimeError where a program can't be started: neither is a reward of 0.
    """
    if allow_unsafe is not True:
        raise ValueError(
            "workers.rewards:code runs what the model writes, without a sandbox; set "
            "allow_unsafe: true in its options (reward.parts) if that may happen on these machines"
        )
    if not (timeout_s > 0 and memory_mb >= LEAST_MEMORY_MB):
        raise ValueError(
            f"workers.rewards:code has timeout_s={timeout_s} and memory_mb={memory_mb}; use more "
            f"than 0 seconds and at least {LEAST_MEMORY_MB} MiB, which Python itself needs"
        )
    tests = read_tests(answer)
    program, limits = program_of(response), Limits(timeout_s=timeout_s, memory_mb=memory_mb)
    passed = sum(test.passes(program, limits) for test in tests)
    share = passed / len(tests)
    reward = share if partial else float(passed == len(tests))
    return {"reward": reward, "passed": share}


def program_of(response: str) -> str:
    blocks = FENCED.findall(response)
    return str(blocks[-1]) if blocks else response


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A test over the text that the program reads on stdin and the one that it writes on stdout."""

    stdin: str
    stdout: str

    def passes(self, program: str, limits: Limits) -> bool:
        ended, written = run(program, self.stdin, limits)
        return ended and lines_of(written) == lines_of(self.stdout)


@dataclass(frozen=True, slots=True)
class Assertions:
    """Python that runs after the program, in its name space."""

    source: str

    def passes(self, program: str, limits: Limits) -> bool:
        # A program that leaves before the assertions has not passed them: it can't write this.
        mark = secrets.token_hex(16)
        end = f"import sys as _sys\n_sys.stdout.write({mark!r})\n"
        ended, written = run(f"{program}\n\n{self.source}\n{end}", "", limits)
        return ended and written.endswith(mark)


def read_tests(answer: object) -> list[Dialogue | Assertions]:
    """The tests of a row; a ValueError where there are none."""
    tests = answer
    if isinstance(answer, str):
        try:
            tests = json.loads(answer)
        except json.JSONDecodeError:
            tests = [answer]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        inputs, outputs = tests["inputs"], tests["outputs"]
        if len(inputs) != len(outputs):
            raise ValueError(f"answer has {len(inputs)} inputs and {len(outputs)} outputs")
        tests = [
            {"input": given, "output": expected}
            for given, expected in zip(inputs, outputs, strict=True)
        ]
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"answer is {str(answer)[:80]!r}; give tests, at least one")
    return [read_test(test) for test in tests]


def read_test(test: Any) -> Dialogue | Assertions:
    if isinstance(test, Mapping) and {"input", "output"} <= test.keys():
        return Dialogue(text_of(test["input"]), text_of(test["output"]))
    if isinstance(test, str) and "assert" in test:
        return Assertions(test)
    raise ValueError(
        f"a test is {str(test)[:80]!r}; give {{input, output}}, or Python with assert statements"
    )


def text_of(value: object) -> str:
    """Text, or lines of text."""
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return str(value)


def lines_of(text: str) -> list[str]:
    """Its lines without blanks at their ends and without empty ones at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run(program: str, stdin: str, limits: Limits) -> tuple[bool, str]:
    """Whether the program ended by itself with status 0, and what it wrote on stdout."""
    with tempfile.TemporaryDirectory(prefix="program-") as directory:
        source = Path(directory) / "program.py"
        source.write_text(program, encoding="utf-8", errors="backslashreplace")
        environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "LANG": "C.UTF-8"}
        environment["OMP_NUM_THREADS"] = "1"
        # The launcher tells on a pipe that the limits are set, and closes it: the program can't.
        ready, tell = os.pipe()
        with (
            os.fdopen(ready, "rb") as limited,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as written,
        ):
            given.write(stdin.encode("utf-8", "backslashreplace"))
            given.seek(0)
            try:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", str(LAUNCHER), str(source)),
                        *(str(limits.timeout_s), str(limits.memory_mb), str(tell)),
                    ],
                    cwd=directory,
                    env=environment,
                    stdin=given,
                    stdout=written,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(tell,),
                )
            except OSError as error:
                raise RuntimeError(f"a program can't be started here: {error}") from error
            finally:
                os.close(tell)
            try:
                status = wait_for(process, limits.timeout_s + START_S)
            finally:
                kill_group(process)
            if not limited.read():
                raise RuntimeError(
                    "a program can't be started here, or its limits can't be set (setrlimit)"
                )
            written.seek(0)
            return status == 0, written.read(OUTPUT_BYTES).decode("utf-8", "replace")


def wait_for(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Its exit status; that of a killed process after timeout_s, in which the time that it waited
    for a busy processor does not count: it is not the program's fault."""
    started = time.monotonic()
    left = timeout_s
    while left > 0:
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            left = timeout_s + waited_s(process.pid) - (time.monotonic() - started)
    return -signal.SIGKILL


def waited_s(pid: int) -> float:
    """Seconds that the process was ready to run and did not; 0 where the system does not say."""
    try:
        _, nanoseconds, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(nanoseconds) / 1e9


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and whatever it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
