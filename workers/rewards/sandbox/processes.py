"""Starting programs in the sandbox, and watching them from outside."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

LAUNCHER = Path(__file__).with_name("launcher.py")
START_S = 120.0
"""The longest that Python and the walls may take, on a machine that is very busy."""
OUTPUT_BYTES = 2**20
"""The most that is compared of what a program writes."""
WORK_BYTES = 64 * 2**20
LOOK_EVERY_S = 0.05
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """The sandbox could not be built or broke; it says nothing about the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    timeout_s: float
    """By the clock, without the time that a program waits for a busy processor."""
    memory_mb: int
    namespaces: bool = True
    """Use name spaces where the kernel allows them; false: only what needs no permission."""


@dataclass(slots=True)
class Program:
    """A process in the sandbox."""

    process: subprocess.Popen[bytes]
    directory: Path
    report: BinaryIO

    def wait(self, timeout_s: float) -> int:
        """Its exit status; that of a killed process after timeout_s, or once its directory is too
        large."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s + waited_s(self.process.pid):
            try:
                return self.process.wait(timeout=LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                if bytes_in(self.directory) > WORK_BYTES:
                    break
        return -signal.SIGKILL

    def read_layers(self) -> Mapping[str, Any]:
        """The layers that held before anything of the program ran; a SandboxError otherwise."""
        ready, _, _ = select.select([self.report], [], [], START_S)
        text = self.report.read() if ready else b""
        try:
            layers: dict[str, Any] = json.loads(text)
        except ValueError:
            raise SandboxError(
                "a program can't be started here: its process ended before its sandbox was built"
            ) from None
        if "error" in layers:
            raise SandboxError(f"the sandbox does not hold here: {layers['error']}")
        return layers


@contextmanager
def started(
    mode: str,
    program: str,
    limits: Limits,
    *,
    stdin: BinaryIO | int = subprocess.DEVNULL,
    stdout: BinaryIO | int = subprocess.DEVNULL,
    pipes: Mapping[str, int] | None = None,
) -> Iterator[Program]:
    """A program that runs, and is killed at the end. pipes: descriptors that it inherits."""
    with ExitStack() as stack:
        outer = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="program-")))
        directory = outer / "work"
        directory.mkdir()
        outer.chmod(0o711)  # its own user has to reach its directory
        source = outer / "program.py"
        source.write_text(program, encoding="utf-8", errors="backslashreplace")
        read, report = os.pipe()
        reading = stack.enter_context(os.fdopen(read, "rb"))
        settings = {
            "mode": mode,
            "program": str(source),
            "directory": str(directory),
            "packages": packages(),
            "timeout_s": limits.timeout_s,
            "memory_mb": limits.memory_mb,
            "namespaces": limits.namespaces,
            "report": report,
            **(pipes or {}),
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(settings)],
                cwd=directory,
                env=ENVIRONMENT,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(report, *(pipes or {}).values()),
            )
        except OSError as error:
            raise SandboxError(f"a program can't be started here: {error}") from error
        finally:
            os.close(report)
        try:
            yield Program(process, directory, reading)
        finally:
            kill(process)


def run(program: str, stdin: str, limits: Limits) -> tuple[bool, str]:
    """Whether the program ended by itself with status 0, and what it wrote on stdout."""
    with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as written:
        text.write(stdin.encode("utf-8", "backslashreplace"))
        text.seek(0)
        with started("run", program, limits, stdin=text, stdout=written) as running:
            running.read_layers()
            status = running.wait(limits.timeout_s)
        written.seek(0)
        return status == 0, written.read(OUTPUT_BYTES).decode("utf-8", "replace")


def judge(program: str, tests: str, limits: Limits) -> bool:
    """Whether every assertion of the tests holds. They run in a second sandbox, which the program
    reaches by the answers to its calls alone; the verdict is a number that only the judge knows."""
    nonce = secrets.token_hex(16)
    with ExitStack() as stack:
        questions, ask = os.pipe()
        answers, reply = os.pipe()
        read, verdict = os.pipe()
        result = stack.enter_context(os.fdopen(read, "rb"))
        text = stack.enter_context(tempfile.TemporaryFile())
        text.write(f"{nonce}\n{tests}".encode("utf-8", "backslashreplace"))
        text.seek(0)
        try:
            pipes = {"reads": questions, "writes": reply}
            serving = stack.enter_context(started("serve", program, limits, pipes=pipes))
            pipes = {"reads": answers, "writes": ask, "verdict": verdict}
            judging = stack.enter_context(started("judge", "", limits, stdin=text, pipes=pipes))
        finally:
            for descriptor in (questions, ask, answers, reply, verdict):
                os.close(descriptor)
        serving.read_layers()
        judging.read_layers()
        judging.wait(limits.timeout_s)
        kill(judging.process)
        words = result.read(1000).decode("utf-8", "replace")
    if words.startswith("?"):
        raise ValueError(f"answer: {words[1:]}")
    return words == nonce


@cache
def packages() -> list[str]:
    """Where installed packages are, of which a program may import any."""
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


def waited_s(pid: int) -> float:
    """Seconds that the process was ready to run and did not; 0 where the system does not say."""
    try:
        _, nanoseconds, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return int(nanoseconds) / 1e9


def bytes_in(directory: Path) -> int:
    """The size of all files below it, as far as it can be seen from here."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the program; it could start no other process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
